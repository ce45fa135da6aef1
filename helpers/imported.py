"""Preference pairs that nobody here wrote: streamed from a file, checked row by row, made into tables.

A first pass keeps some numbers of each row (`scan`); what is left out and who is drawn follows from them. So a file
of any size is read in bounded memory, and only the people who are brought into the run are held as texts.
"""

import csv
import hashlib
import json
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from helpers import formats
from helpers.artifacts import atomic
from helpers.fingerprint import digest
from helpers.people import normalised
from helpers.schemas import TABLES

FIELDS = ["user", "prompt", "chosen", "rejected"]
TEXTS = FIELDS[1:]
MIN_PAIRS = 20  # a user with fewer leaves too little to train on, to draw shots from and to test on
NAMED = ("persona_id", "user", "user_id", "name", "description")  # columns of data.people that are no group
REASONS = {1: "repeated row: the same as line {line}", 2: "contradictory pair: line {line} swaps chosen and rejected",
           3: "leak: the prompt with an answer is trained on too, or the person trains on the question",
           4: "leak: the question or an answer stands in the person's own history",
           5: "user with too few pairs: {user!r} has {n} good ones, expected {least}"}
NUMBERS = {"line": "q", "user": "Q", "key": "Q", "turned": "Q", "won": "Q", "lost": "Q", "asked": "Q", "longer": "b",
           "test": "b", "told": "b"}  # columns of Scan.rows and how they are stored


class Problem(NamedTuple):
    """A line that was left out: its number (from 1), why, and its text."""

    line: int
    reason: str
    raw: str


class Scan(NamedTuple):
    """What one pass over a file keeps: some sixty bytes for a row that can be read.

    rows: line; user; 64-bit digests of the row (key), of its swap (turned), of prompt with chosen and with rejected
    (won, lost) and of user with question (asked); longer: whether chosen is longer (1), as long (0) or shorter (-1) in
    characters; test: 1 test, 0 train, -1 nothing said; told: an answer stands in the own history. why: the key of
    REASONS, 0 for a good row; other: the line that it is about, or the user's number of good rows. trained: digests
    of prompt with answer in histories. unread: lines that can't be read; reasons: how many for which reason.
    """

    form: str
    rows: dict[str, np.ndarray]
    why: np.ndarray
    other: np.ndarray
    trained: np.ndarray
    unread: np.ndarray
    reasons: Counter

    @property
    def good(self) -> np.ndarray:
        """Which rows are left: bool."""
        return self.why == 0

    @property
    def users(self) -> np.ndarray:
        """Digests of the users who have a good row, sorted."""
        return np.unique(self.rows["user"][self.good])


def scan(path: str | Path, min_pairs: int = MIN_PAIRS) -> Scan:
    """Read a file once, in bounded memory, and decide about each row; min_pairs: good rows that a user needs.

    Where the file says what is train and what is test, a user needs both (of AlignX each row has its own).
    """
    form, kept = formats.detect(path), {name: array(code) for name, code in NUMBERS.items()}
    trained, unread, reasons = array("Q"), array("q"), Counter()
    for number, unit in tqdm(formats.units(path, form), desc=f"reading {Path(path).name}", unit=" rows", leave=False, delay=5):
        try:
            row = formats.parse(unit, form)
        except ValueError as error:
            unread.append(number)
            reasons[str(error).split(":")[0]] += 1
            continue
        for name, value in zip(NUMBERS, _numbers(number, row), strict=True):
            kept[name].append(value)
        trained.extend(_hash(pair[0], answer) for pair in row.history for answer in pair[1:])
    rows = {name: np.frombuffer(values, dtype=values.typecode) for name, values in kept.items()}
    seen = np.frombuffer(trained, dtype="Q")
    seen.sort()  # in place: np.unique of eight million digests would need four times their memory
    why, other = _judge(rows, seen, 1 if form == "alignx" else min_pairs)
    return Scan(form, rows, why, other, seen, np.frombuffer(unread, dtype="q"), reasons)


def pairs(path: str | Path, found: Scan, limit: int = 0, seed: int = 17) -> pd.DataFrame:
    """The good rows of the drawn users, in the order of the file.

    limit: at most so many users, drawn; 0: all. Returns line, user, prompt, chosen, rejected, split (train, test
    or "") and description. Pairs of a history come before their row, once, as train.
    """
    wanted = found.good & np.isin(found.rows["user"], _drawn(found.users, limit, seed))
    lines, rows, known = set(found.rows["line"][wanted].tolist()), [], set()
    for number, unit in formats.units(path, found.form):
        if number in lines:
            row = formats.parse(unit, found.form)
            for shot in row.history:
                if (row.user, *shot) not in known:
                    known.add((row.user, *shot))
                    rows.append((number, row.user, *shot, "train", row.description))
            rows.append((number, *row[:5], row.description))
    return pd.DataFrame(rows, columns=["line", *FIELDS, "split", "description"])


def left_out(path: str | Path, found: Scan, least: int = MIN_PAIRS) -> Iterator[Problem]:
    """A Problem for every row of the file that is not blank and not good, in its order; least: as min_pairs."""
    bad = ~found.good
    lines = np.concatenate([found.unread, found.rows["line"][bad]])
    order = np.argsort(lines)
    why = np.concatenate([np.zeros(len(found.unread), dtype=int), found.why[bad]])[order]
    other, lines, at = np.concatenate([found.unread, found.other[bad]])[order], lines[order], 0
    for number, unit in formats.units(path, found.form):
        if at == len(lines):
            return
        if number == lines[at]:
            yield Problem(number, _reason(unit, found.form, int(why[at]), int(other[at]), least), formats.printable(unit))
            at += 1


def read_people(path: str | Path) -> pd.DataFrame:
    """A CSV of people: user (or persona_id, user_id), and if they are there name, description and group columns.

    Returns user, name (the user where there is none), description and demographics (a JSON object of the other
    columns; an empty cell is "unknown"). Raises ValueError without a column of users, or for one who is twice in it.
    """
    table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    key = next((column for column in ("user", "persona_id", "user_id") if column in table), None)
    if key is None:
        raise ValueError(f"{path}: no column user, persona_id or user_id, only {', '.join(table)}")
    if table[key].duplicated().any():
        raise ValueError(f"{path}: {table[key][table[key].duplicated()].iloc[0]!r} is there twice, expected a row a user")
    groups = table[[column for column in table if column not in NAMED]].replace("", "unknown")
    told = table.reindex(columns=["name", "description"], fill_value="").map(str.strip)
    return pd.DataFrame({"user": table[key], "name": told["name"].where(told["name"] != "", table[key]),
                         "description": told["description"],
                         "demographics": [json.dumps(row) for row in groups.to_dict("records")]})


def to_tables(pairs: pd.DataFrame, seed: int, people: pd.DataFrame | None = None) -> dict[str, pd.DataFrame]:
    """The tables personas, questions and preferences of imported pairs.

    A prompt that two users or more label is a divergent question, any other a personal one. A prompt is train
    or test for everybody, and each user gets half of both as near as can be; unless the rows say what they are
    (column split): then a prompt that is both is nobody's shared question. people: as from `read_people`.
    Ids of questions, responses and pairs are hashes of the texts.
    """
    pairs = pairs.reindex(columns=[*FIELDS, "split", "description"], fill_value="")
    words, given = pairs["prompt"].map(_words), pairs["split"] != ""
    split = pairs["split"].where(given, words.map(_halves(words[~given], pairs["user"], seed)))
    users = pairs.groupby("user", sort=False)["description"].first()
    ids = {user: f"p{i:02d}" for i, user in enumerate(users.index, start=1)}
    shared = pairs.groupby("prompt")["user"].transform("nunique") > 1
    shared &= split.groupby(words).transform("nunique") == 1
    rows = pairs.assign(kind=np.where(shared, "divergent", "personal"), split=split,
                        axis=np.where(shared, "imported", "personal"), persona_id=pairs["user"].map(ids))
    whose = rows["user"].where(~shared, "")
    rows["question_id"] = [_id(texts) for texts in zip(whose, pairs["prompt"], strict=True)]
    for column, parts in {"pair_id": FIELDS, "chosen_id": ["prompt", "chosen"],
                          "rejected_id": ["prompt", "rejected"]}.items():
        rows[column] = [_id(texts) for texts in pairs[parts].itertuples(index=False)]
    rows = rows.drop_duplicates("pair_id")
    questions = rows.drop_duplicates("question_id").rename(columns={"prompt": "text"})
    questions["persona_id"] = questions["persona_id"].where(questions["kind"] == "personal", "")
    tables = {"personas": _personas(users, ids, people), "questions": questions, "preferences": rows}
    return {table: df[list(TABLES[table].columns)].reset_index(drop=True) for table, df in tables.items()}


def import_into(store) -> None:
    """Write the tables of profile.data.preferences into the run folder, and say what was found and left out.

    Beside them import_problems.csv (every row that was left out) and import_audit.csv (`audit.of_file`). Does
    nothing where the run has them from the same files. Raises ValueError with fewer users than folds; the
    problems are written before.
    """
    from helpers import audit  # it checks what comes of an import too

    data, seed = store.profile.data, store.profile.seed
    path, listed, folds = Path(data.preferences), store.path / "import_problems.csv", store.profile.training.folds
    made = {"files": [digest(Path(file)) for file in (data.preferences, data.people) if file], "seed": seed,
            "users": data.users, "min_pairs": data.min_pairs, "code": digest(Path(__file__)) + digest(Path(formats.__file__))}
    if store.log()["stages"].get("import", {}).get("made") == made and all(map(store.has, ("personas", "preferences"))):
        return
    found = scan(path, data.min_pairs)
    count = _list_problems(left_out(path, found, data.min_pairs), listed)
    print(f"{path}: format {found.form}, {found.good.sum():,} good pairs of {len(found.users):,} users; {count:,} rows "
          f"left out, see {listed}")
    report = audit.of_file(found)
    report.to_csv(store.path / "import_audit.csv", index=False)
    for row in report[report["found"].gt(0) & report["status"].ne("ok")].itertuples():
        print(f"  {row.check}: {row.found:,} of {row.of:,}")
    rows, people = pairs(path, found, data.users, seed), None
    if data.people and Path(data.people) != path:
        people = read_people(data.people)
    rows = _described(rows, people, store.profile)
    users = rows["user"].nunique()
    if users < len(found.users):
        print(f"  {users:,} of the {len(found.users):,} users come into the run (data.users = {data.users}, 0: all)")
    if users < folds:
        raise ValueError(f"{users} users with {data.min_pairs} good pairs or more, but training.folds is {folds}: "
                         "add users, lower data.min_pairs, or set training.folds from 2 to the number of users")
    for table, df in to_tables(rows, seed, people).items():
        store.write(table, df)
    store.record("import", path=str(path), format=found.form, users=users, pairs=len(rows), rows_left_out=count, made=made)


def _numbers(number: int, row: formats.Row) -> tuple:
    """The values of NUMBERS for a row."""
    question = _words(row.prompt)
    told = row.told or any(_words(shot[0]) == question for shot in row.history)
    longer = (len(row.chosen) > len(row.rejected)) - (len(row.chosen) < len(row.rejected))
    return (number, _hash(row.user), _hash(*row[:4]), _hash(row.user, row.prompt, row.rejected, row.chosen),
            _hash(row.prompt, row.chosen), _hash(row.prompt, row.rejected), _hash(row.user, question), longer,
            {"test": 1, "train": 0}.get(row.split, -1), told)


def _words(prompt: str) -> str:
    """Prompts that differ in nothing but case and punctuation are one question."""
    return normalised(prompt) or prompt


def _hash(*texts: str) -> int:
    return int.from_bytes(blake2b("\x00".join(texts).encode(), digest_size=8).digest(), "little")


def _judge(rows: dict[str, np.ndarray], trained: np.ndarray, min_pairs: int) -> tuple[np.ndarray, np.ndarray]:
    """Why each row is left out (a key of REASONS; 0: it is not), and the line or number that this is about."""
    n, line = len(rows["line"]), rows["line"]
    why, other = np.zeros(n, dtype=np.int8), np.zeros(n, dtype=np.int64)
    keys, first, at = np.unique(rows["key"], return_index=True, return_inverse=True)
    repeated = first[at] != np.arange(n)
    why[repeated], other[repeated] = 1, line[first[at]][repeated]
    turned = (why == 0) & _among(rows["turned"], keys)
    other[turned] = line[first[np.searchsorted(keys, rows["turned"][turned])]]
    why[turned] = 2
    train = rows["test"] == 0
    side = np.sort(np.concatenate([rows["won"][train], rows["lost"][train]]))
    known = _among(rows["asked"], np.sort(rows["asked"][train]))
    for answer, answers in ((a, known_to) for a in ("won", "lost") for known_to in (trained, side)):
        known |= _among(rows[answer], answers)
    why[(why == 0) & (rows["test"] == 1) & known] = 3
    why[(why == 0) & (rows["told"] == 1)] = 4
    _too_few(rows, why, other, min_pairs)
    return why, other


def _among(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Which values are among the sorted known ones (np.isin would sort copies of both)."""
    if not len(known):
        return np.zeros(len(values), dtype=bool)
    return known[np.minimum(np.searchsorted(known, values), len(known) - 1)] == values


def _too_few(rows: dict[str, np.ndarray], why: np.ndarray, other: np.ndarray, min_pairs: int) -> None:
    """Mark the rows of users with fewer good ones than `min_pairs`, or, where the file says which is which, with
    too few to train on or none to test on."""
    users, who = np.unique(rows["user"], return_inverse=True)
    good, said = why == 0, rows["test"] >= 0
    count = np.bincount(who[good], minlength=len(users))
    train = np.bincount(who[good & (rows["test"] == 0)], minlength=len(users))
    test = np.bincount(who[good & (rows["test"] == 1)], minlength=len(users))
    few = count < min_pairs
    if min_pairs > 1:
        few |= (np.bincount(who[said], minlength=len(users)) > 0) & ((train < formats.MIN_HISTORY) | (test < 1))
    lacking = good & few[who]
    why[lacking], other[lacking] = 5, count[who][lacking]


def _reason(unit: Any, form: str, why: int, other: int, least: int) -> str:
    """In words; a row that can't be read is parsed again for its reason."""
    row = None
    if why:
        row = formats.parse(unit, form)
        return REASONS[why].format(line=other, n=other, user=row.user, least=least)
    try:
        formats.parse(unit, form)
    except ValueError as error:
        return str(error)
    raise RuntimeError("the file changed while it was read: start again")


def _list_problems(problems: Iterator[Problem], path: Path) -> int:
    """Write them as a CSV, one at a time. Returns how many."""
    count = 0
    with atomic(path) as file, file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(Problem._fields)
        for count, problem in enumerate(problems, start=1):  # noqa: B007 it is what is returned
            writer.writerow(problem)
    return count


def _drawn(users: np.ndarray, limit: int, seed: int) -> np.ndarray:
    """At most `limit` of the users, drawn whatever their order in the file."""
    return np.random.default_rng([seed, 11]).permutation(users)[:limit or None]


def _described(rows: pd.DataFrame, people: pd.DataFrame | None, cfg) -> pd.DataFrame:
    """The rows of those who can have every prefix: persona_gold needs a description of the person."""
    if "persona_gold" not in cfg.prefixes.names:
        return rows
    told = (rows.drop_duplicates("user") if people is None else people).set_index("user")["description"]
    without = set(rows["user"]) - set(told[told != ""].index)
    if without:
        print(f"  {len(without):,} users left out: {cfg.data.people} has no description of them. To keep them: "
              '--set "prefixes.names=[none, tag, few_shot, name]"')
    return rows[~rows["user"].isin(without)]


def _personas(users: pd.Series, ids: dict[str, str], people: pd.DataFrame | None) -> pd.DataFrame:
    """The table; users: user -> description in the rows, which `people` (as from read_people) goes before."""
    made = pd.DataFrame({"user": users.index, "name": users.index, "description": users.to_numpy(), "demographics": "{}"})
    if people is not None:
        known = people.set_index("user").reindex(made["user"]).reset_index(drop=True)
        made = made.assign(**{column: known[column].fillna(made[column]) for column in ("name", "demographics")},
                           description=known["description"].replace("", np.nan).fillna(made["description"]))
    return made.assign(persona_id=made["user"].map(ids), axes=[["imported"]] * len(made), categories=[["imported"]] * len(made),
                       tag=[f"<special_person_tag_{i + 1}>" for i in range(len(made))])


def _halves(questions: pd.Series, users: pd.Series, seed: int) -> dict[str, str]:
    """question -> train or test: the most shared first, each to the side its users lack; ties are drawn."""
    who, lead, split = defaultdict(list), Counter(), {}
    for question, user in sorted(zip(questions, users[questions.index], strict=True)):
        who[question].append(user)
    rng = np.random.default_rng([seed, 3])
    for question in sorted(rng.permutation(list(who)).tolist(), key=lambda question: -len(who[question])):
        train = sum(lead[user] for user in who[question]) + rng.choice([-0.5, 0.5]) < 0
        split[question] = "train" if train else "test"
        lead.update({user: n if train else -n for user, n in Counter(who[question]).items()})
    return split


def _id(texts: Sequence[str]) -> str:
    return hashlib.sha256("\x00".join(texts).encode()).hexdigest()[:16]
