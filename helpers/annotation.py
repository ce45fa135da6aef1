"""The label check: people choose as the judge did (paper, Appendix D). Pages out, CSV files in, Table 6.

A pack is ten pairs of one person. It becomes one HTML page that needs no network; whoever fills it in saves a CSV
file. Nothing on the page tells what the judge chose. Simulated annotators write files of the same form.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random

import jinja2
import numpy as np
import pandas as pd

from helpers import DATA
from helpers.agreement import cohen_kappa, krippendorff_alpha, match_rate, mean_kappa
from helpers.artifacts import atomic

COLUMNS = ("pack_id", "annotator", "quiz_tries", "pair_id", "answer")
SCALE = {1: "Answer 1", 2: "Answer 2", 0: "I cannot tell"}
PEOPLE, PAIRS = 5, 10  # as in the paper
OPTIONS = 4


class AnnotationError(ValueError):
    """A filled-in file that cannot be used: says which, what was found and what was expected."""


def draw_packs(preferences: pd.DataFrame, personas: pd.DataFrame, seed: int, axes: Sequence[str] = (),
               n_people: int = PEOPLE, n_pairs: int = PAIRS) -> pd.DataFrame:
    """Pairs for annotators: up to `n_people` people of `axes` (empty: all), for each half personal half divergent pairs.

    Returns a row per pair, packs together: pack_id, persona_id, name, pair_id, kind, question, first, second (texts),
    first_id, second_id, judge (1 or 2: where the chosen answer stands; the order is drawn). The pack's id changes with
    its texts, so that a file filled in for another run is told apart.
    """
    known = personas[[not axes or bool({*axes} & {*own}) for own in personas["axes"]]]
    able = known[known["persona_id"].isin(preferences["persona_id"])]
    people = able.sample(min(n_people, len(able)), random_state=seed).sort_values("persona_id")
    return pd.concat([_pack(person, preferences, seed, n_pairs) for person in people.itertuples()], ignore_index=True)


def quiz(persona_id: str, personas: pd.DataFrame, seed: int) -> list[dict]:
    """Questions that somebody who knows the person answers: what is said of them, and their category on each axis.

    Each has question, options (texts, shuffled) and right (an index). The paper asks two a person (Table 5).
    """
    person = personas.set_index("persona_id").loc[persona_id]
    asked = [(f"Which of these is said of {person['name']}?", person["description"], set(personas["description"]))]
    everybody = personas.explode(["axes", "categories"])
    for axis, own in zip(person["axes"], person["categories"], strict=True):
        there = set(everybody.loc[everybody["axes"] == axis, "categories"])
        asked.append((f"{axis}: what fits {person['name']}?", own, there))
    return [_with_options(question, own, others, f"{seed} quiz {persona_id} {question}")
            for question, own, others in asked[:2] if len(others) > 1]


def write_pack(pack: pd.DataFrame, personas: pd.DataFrame, folder: Path, seed: int, simulated: bool) -> Path:
    """The page of one pack (rows of `draw_packs`) as folder/<pack_id>.html: one file, all texts escaped."""
    pack_id, persona_id, name = pack[["pack_id", "persona_id", "name"]].iloc[0]
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(DATA / "templates"), autoescape=True,
                                     undefined=jinja2.StrictUndefined)
    html = environment.get_template("label_check.html.j2").render(
        pack_id=pack_id, name=name, simulated=simulated, columns=COLUMNS, scale=SCALE,
        quiz=quiz(persona_id, personas, seed), about=_about(persona_id, personas, simulated),
        pairs=pack[["pair_id", "question", "first", "second"]].to_dict("records"))
    folder.mkdir(parents=True, exist_ok=True)
    with atomic(folder / f"{pack_id}.html") as file:
        file.write_text(html, encoding="utf-8")
    return folder / f"{pack_id}.html"


def simulate(pack: pd.DataFrame, utility: pd.DataFrame, annotator: str, knowledge: float, seed: int) -> pd.DataFrame:
    """A simulated annotator's file: each pair is known with probability `knowledge`, else guessed.

    Known: the answer of higher latent utility (`world.teacher.truth`); of two alike, a guess. The quiz takes a
    second try unless both of its questions are known.
    """
    random, rows = Random(f"{seed} {annotator} {pack['pack_id'].iloc[0]}"), []
    tries = 1 if random.random() < knowledge**2 else 2
    for pair, gap in zip(pack.itertuples(), _gaps(pack, utility), strict=True):
        knows, guess = random.random() < knowledge, random.choice((1, 2))
        answer = guess if not knows or abs(gap) < 1e-9 else 1 if gap > 0 else 2
        rows.append((pair.pack_id, annotator, tries, pair.pair_id, answer))
    return pd.DataFrame(rows, columns=COLUMNS)


def alike(packs: pd.DataFrame, utility: pd.DataFrame) -> float:
    """Share of the pairs whose two answers are worth the same to the person: nobody can know the better one."""
    return float(np.mean(np.abs(_gaps(packs, utility)) < 1e-9))


def write_answers(answers: pd.DataFrame, folder: Path) -> Path:
    """A simulated annotator's answers as the page would save them: folder/<pack_id>-<annotator>.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{answers['pack_id'].iloc[0]}-{answers['annotator'].iloc[0]}.csv"
    with atomic(path) as file:
        answers.to_csv(file, index=False, lineterminator="\r\n")
    return path


def read_pack(files: Iterable[Path], packs: pd.DataFrame) -> pd.DataFrame:
    """The filled-in files as tidy ratings: persona_id, pair_id, annotator, quiz_tries, answer (1, 2; NaN: cannot tell).

    packs: of `draw_packs`. Raises AnnotationError for a file that is no CSV of the page, belongs to another pack,
    lacks, repeats or invents a pair, or has a value off the scale, and for a pack filled in twice under one name.
    """
    ratings, seen = [], {}
    for path in sorted(map(Path, files)):
        rows = _read(path)
        pack = packs[packs["pack_id"] == rows["pack_id"].iloc[0]]
        _check(path, rows, pack, packs)
        key = (rows["pack_id"].iloc[0], rows["annotator"].iloc[0])
        if key in seen:
            raise AnnotationError(f"{path.name}: {key[1]} filled in pack {key[0]} before, in {seen[key]}; keep one of them")
        seen[key] = path.name
        answers = rows["answer"].astype(float).replace(0.0, np.nan)
        ratings.append(rows[["pair_id", "annotator"]].assign(
            persona_id=pack["persona_id"].iloc[0], quiz_tries=rows["quiz_tries"].astype(int), answer=answers))
    columns = ["persona_id", "pair_id", "annotator", "quiz_tries", "answer"]
    return pd.concat(ratings, ignore_index=True)[columns] if ratings else pd.DataFrame(columns=columns)


def table6(ratings: pd.DataFrame, packs: pd.DataFrame) -> pd.DataFrame:
    """The paper's Table 6: a row per measure, a column per person with ratings, and their mean and std (ddof 1).

    Measures: human_1, human_2, … (share of the answered pairs that match the judge; numbered by name within a
    person, so human_1 is not one human), average, kappa_human_human and kappa_human_judge (mean over pairs of raters),
    krippendorff_alpha (people and judge together). NaN where a measure is not determined.
    """
    columns = {}
    for persona_id, given in ratings.groupby("persona_id"):
        pack = packs[packs["persona_id"] == persona_id].set_index("pair_id")
        table = given.pivot(index="annotator", columns="pair_id", values="answer")[pack.index]
        columns[pack["name"].iloc[0]] = _measures(table.to_numpy(float), pack["judge"].to_numpy(float))
    table = pd.DataFrame(columns)
    people = [row for row in table.index if row.startswith("human_")]
    rest = ["average", "kappa_human_human", "kappa_human_judge", "krippendorff_alpha"]
    table = table.reindex([*sorted(people), *rest])
    return table.assign(mean=table.mean(axis=1), std=table.std(axis=1)).rename_axis("measure").reset_index()


def _pack(person, preferences: pd.DataFrame, seed: int, n_pairs: int) -> pd.DataFrame:
    own, half = preferences[preferences["persona_id"] == person.persona_id], n_pairs // 2
    drawn = [of_kind.sample(min(half, len(of_kind)), random_state=seed) for _, of_kind in own.groupby("kind")]
    pairs = pd.concat(drawn).sort_values("pair_id").sample(frac=1, random_state=seed)
    coin = Random(f"{seed} order {person.persona_id}")
    judge = np.array([coin.choice((1, 2)) for _ in range(len(pairs))])
    rows = pairs[["persona_id", "pair_id", "kind"]].assign(
        name=person.name, question=pairs["prompt"], judge=judge,
        first=pairs["chosen"].where(judge == 1, pairs["rejected"]),
        second=pairs["chosen"].where(judge == 2, pairs["rejected"]),
        first_id=pairs["chosen_id"].where(judge == 1, pairs["rejected_id"]),
        second_id=pairs["chosen_id"].where(judge == 2, pairs["rejected_id"]))
    text = repr(rows[["pair_id", "question", "first", "second"]].to_numpy().tolist())
    pack_id = f"{person.persona_id}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return rows.assign(pack_id=pack_id)


def _gaps(packs: pd.DataFrame, utility: pd.DataFrame) -> np.ndarray:
    """(pairs,): utility of the first answer minus that of the second."""
    known = utility.set_index(["persona_id", "response_id"])["utility"]
    return np.array([known[p.persona_id, p.first_id] - known[p.persona_id, p.second_id] for p in packs.itertuples()])


def _with_options(question: str, right: str, others: set[str], seed: str) -> dict:
    """Up to OPTIONS texts, the right one among them, shuffled by the seed."""
    random = Random(seed)
    wrong = sorted(others - {right})
    options = sorted([right, *random.sample(wrong, min(OPTIONS - 1, len(wrong)))])
    random.shuffle(options)
    return {"question": question, "options": options, "right": options.index(right)}


def _about(persona_id: str, personas: pd.DataFrame, simulated: bool) -> str:
    """What somebody reads who fails the quiz."""
    person = personas.set_index("persona_id").loc[persona_id]
    if not simulated:
        return (f"Read an encyclopedia's article on {person['name']}, and more if you can, before you go on. "
                "If the quiz itself is wrong, stop and tell whoever gave you this page.")
    groups = ", ".join(f"{axis}: {category}" for axis, category in zip(person["axes"], person["categories"], strict=True))
    return f"All that is on record about {person['name']}: {person['description']} ({groups})."


def _read(path: Path) -> pd.DataFrame:
    try:
        rows = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (ValueError, pd.errors.ParserError) as error:
        raise AnnotationError(f"{path.name}: not a CSV file of the label check: {error}") from None
    if list(rows.columns) != list(COLUMNS) or rows.empty:
        raise AnnotationError(f"{path.name}: found {len(rows)} rows with the columns {list(rows.columns)}, expected "
                              f"{list(COLUMNS)}: was it saved by the page?")
    return rows


def _check(path: Path, rows: pd.DataFrame, pack: pd.DataFrame, packs: pd.DataFrame) -> None:
    """Raise AnnotationError with the first thing that is wrong."""
    wanted, found = set(pack["pair_id"]), list(rows["pair_id"])
    off = sorted(set(rows["answer"]) - {str(value) for value in SCALE})
    known = sorted(packs["pack_id"].unique())
    problems = {
        f"made for the pack {rows['pack_id'].iloc[0]}; this run's packs are {', '.join(known)}. Other pairs or another "
        "run: move the file away, or fill in this run's page": not len(pack),
        f"more than one pack or annotator in it: {rows[['pack_id', 'annotator']].drop_duplicates().to_numpy().tolist()}":
            len(rows[["pack_id", "annotator"]].drop_duplicates()) > 1,
        f"no name in the column annotator, expected letters, digits, - and _: found {rows['annotator'].iloc[0]!r}":
            not re.fullmatch(r"[^\W_][\w-]*", rows["annotator"].iloc[0]),
        f"pairs missing: {sorted(wanted - set(found))} of {len(wanted)}": wanted - set(found),
        f"pairs that are not in the pack: {sorted(set(found) - wanted)}": set(found) - wanted,
        f"pairs more than once: {sorted({pair for pair in found if found.count(pair) > 1})}": len(found) > len(set(found)),
        f"answers off the scale: {off}, expected {', '.join(map(str, SCALE))} (0: cannot tell)": off,
        f"quiz_tries: found {sorted(set(rows['quiz_tries']))}, expected whole numbers from 1 on":
            not rows["quiz_tries"].str.fullmatch(r"[1-9]\d*").all(),
    }
    for problem, is_so in problems.items():
        if is_so:
            raise AnnotationError(f"{path.name}: {problem}")


def _measures(people: np.ndarray, judge: np.ndarray) -> pd.Series:
    """people: (annotators, pairs), judge: (pairs,)."""
    rates = {f"human_{i}": match_rate(row, judge) for i, row in enumerate(people, start=1)}
    with_judge = [kappa for row in people if not np.isnan(kappa := cohen_kappa(row, judge))]
    return pd.Series(rates | {
        "average": np.mean(list(rates.values())), "kappa_human_human": mean_kappa(people),
        "kappa_human_judge": np.mean(with_judge) if with_judge else np.nan,
        "krippendorff_alpha": krippendorff_alpha(np.vstack([people, judge]))})
