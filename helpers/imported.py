"""Preference pairs that nobody here wrote: read from JSONL, checked line by line, made into tables."""

import codecs
import hashlib
import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from helpers.schemas import TABLES

FIELDS = ["user", "prompt", "chosen", "rejected"]
MIN_PAIRS = 20  # a user with fewer leaves too little to train on, to draw shots from and to test on
MAX_CHARS = 20_000  # of one field: some 5,000 tokens, past what a training row can hold anyway
UNFIT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")  # control characters and lone surrogates


class Problem(NamedTuple):
    """A line that was left out: its number (from 1), why, and its text."""

    line: int
    reason: str
    raw: str


def read_pairs(path: str | Path) -> tuple[pd.DataFrame, list[Problem]]:
    """Read one JSON object a line with the strings user, prompt, chosen, rejected; other fields are ignored.

    Returns the good rows in the order of the file (columns line, user, prompt, chosen, rejected; outer white
    space removed), and a Problem for every other line that is not blank. A byte-order mark is skipped.
    """
    rows, problems, raw = [], [], {}
    lines = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    for number, line in enumerate(lines, start=1):
        if line.strip():
            raw[number] = _printable(line)
            try:
                rows.append((number, *_fields(line)))
            except ValueError as error:
                problems.append(Problem(number, str(error), raw[number]))
    for check in (_repeated, _contradicted, _too_few):
        reasons = check(rows)
        problems += [Problem(number, reason, raw[number]) for number, reason in reasons.items()]
        rows = [row for row in rows if row[0] not in reasons]
    return pd.DataFrame(rows, columns=["line", *FIELDS]), sorted(problems)


def to_tables(pairs: pd.DataFrame, seed: int) -> dict[str, pd.DataFrame]:
    """The tables personas, questions and preferences of imported pairs.

    A prompt that two users or more label is a divergent question, any other a personal one. A prompt is train
    or test for everybody, and each user gets half of both as near as can be. Ids of questions, responses and
    pairs are hashes of the texts.
    """
    users = list(pairs["user"].unique())
    ids = {user: f"p{i:02d}" for i, user in enumerate(users, start=1)}
    personas = pd.DataFrame({
        "persona_id": ids.values(), "name": users, "axes": [["imported"]] * len(users),
        "categories": [["imported"]] * len(users), "description": "", "demographics": "{}",
        "tag": [f"<special_person_tag_{i + 1}>" for i in range(len(users))]})
    shared, split = pairs.groupby("prompt")["user"].transform("nunique") > 1, _halves(pairs, seed)
    rows = pairs.assign(kind=np.where(shared, "divergent", "personal"), split=pairs["prompt"].map(split),
                        axis=np.where(shared, "imported", "personal"), persona_id=pairs["user"].map(ids))
    for column, parts in {"question_id": ["prompt"], "pair_id": FIELDS, "chosen_id": ["prompt", "chosen"],
                          "rejected_id": ["prompt", "rejected"]}.items():
        rows[column] = [_id(texts) for texts in pairs[parts].itertuples(index=False)]
    questions = rows.drop_duplicates("question_id").rename(columns={"prompt": "text"})
    questions["persona_id"] = questions["persona_id"].where(questions["kind"] == "personal", "")
    tables = {"personas": personas, "questions": questions, "preferences": rows}
    return {table: df[list(TABLES[table].columns)].reset_index(drop=True) for table, df in tables.items()}


def import_into(store) -> None:
    """Write the tables of profile.data.preferences and import_problems.csv into the run folder, and say so.

    Raises ValueError with fewer users than folds; the problems are written before.
    """
    path, listed = Path(store.profile.data.preferences), store.path / "import_problems.csv"
    pairs, problems = read_pairs(path)
    pd.DataFrame(problems, columns=Problem._fields).to_csv(listed, index=False)
    users, folds = pairs["user"].nunique(), store.profile.training.folds
    print(f"{len(pairs)} pairs of {users} users from {path}; {len(problems)} lines left out, see {listed}")
    for reason, count in Counter(problem.reason.split(":")[0] for problem in problems).most_common():
        print(f"  {count} x {reason}")
    if users < folds:
        raise ValueError(f"{users} users with {MIN_PAIRS} good pairs or more, but training.folds is {folds}: "
                         "add users, or set training.folds from 2 to the number of users")
    for table, df in to_tables(pairs, store.profile.seed).items():
        store.write(table, df)
    store.record("import", path=str(path), users=users, pairs=len(pairs), lines_left_out=len(problems))


def _fields(line: bytes) -> list[str]:
    """The four texts of a line. Raises ValueError with the reason for which it can't be used."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte {error.start + 1} is 0x{line[error.start]:02x}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"not an object: found {type(row).__name__}, expected {{...}}")
    for field in FIELDS:
        if field not in row:
            raise ValueError(f"missing field: {field}")
        if not isinstance(row[field], str):
            raise ValueError(f"not a string: {field} is {type(row[field]).__name__}")
        if not row[field].strip():
            raise ValueError(f"empty field: {field}")
        if len(row[field]) > MAX_CHARS:
            raise ValueError(f"over-long text: {field} has {len(row[field])} characters, over {MAX_CHARS}")
        if unfit := UNFIT.search(row[field]):
            code = f"U+{ord(unfit.group()):04X}"
            raise ValueError(f"control character: {field} holds {code} at {unfit.start() + 1}")
    texts = [row[field].strip() for field in FIELDS]
    if texts[2] == texts[3]:
        raise ValueError("chosen equals rejected")
    return texts


def _repeated(rows: list[tuple]) -> dict[int, str]:
    first = {texts: number for number, *texts in reversed(rows) for texts in [tuple(texts)]}
    return {number: f"repeated row: the same as line {first[tuple(texts)]}"
            for number, *texts in rows if first[tuple(texts)] != number}


def _contradicted(rows: list[tuple]) -> dict[int, str]:
    """Both lines of a swapped pair: nothing says which is right."""
    line = {tuple(texts): number for number, *texts in rows}
    return {n: f"contradictory pair: line {line[u, p, r, c]} swaps chosen and rejected"
            for n, u, p, c, r in rows if (u, p, r, c) in line}


def _too_few(rows: list[tuple]) -> dict[int, str]:
    count = Counter(user for _, user, *_ in rows)
    return {n: f"user with fewer than {MIN_PAIRS} pairs: {user!r} has {count[user]} good ones"
            for n, user, *_ in rows if count[user] < MIN_PAIRS}


def _halves(pairs: pd.DataFrame, seed: int) -> dict[str, str]:
    """prompt -> train or test: the most shared first, each to the side its users lack; ties are drawn."""
    users, lead, split = defaultdict(list), Counter(), {}
    for prompt, user in sorted(zip(pairs["prompt"], pairs["user"], strict=True)):
        users[prompt].append(user)
    rng = np.random.default_rng([seed, 3])
    for prompt in sorted(rng.permutation(list(users)).tolist(), key=lambda prompt: -len(users[prompt])):
        train = sum(lead[user] for user in users[prompt]) + rng.choice([-0.5, 0.5]) < 0
        split[prompt] = "train" if train else "test"
        lead.update({user: n if train else -n for user, n in Counter(users[prompt]).items()})
    return split


def _id(texts: tuple[str, ...]) -> str:
    return hashlib.sha256("\x00".join(texts).encode()).hexdigest()[:16]


def _printable(line: bytes) -> str:
    """The line as text; bytes and control characters that a CSV can't hold become \\x escapes."""
    text = line.decode("utf-8", "backslashreplace").strip()
    return UNFIT.sub(lambda found: f"\\x{ord(found.group()):02x}", text)
