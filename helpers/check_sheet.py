"""A check of the questions by hand: a sheet is drawn, somebody rates it, the ratings are read back (Appendix A).

The sheet is a CSV file, so that any editor will do; `form` is one inside a notebook.
"""

import hashlib
from collections.abc import Iterator
from html import escape
from itertools import chain
from pathlib import Path
from random import Random

import ipywidgets
import pandas as pd

from helpers.artifacts import atomic

SCALE = {1: "definitely", 2: "maybe", 3: "not likely"}
MEASURES = {
    "validity": "might this person ask an assistant this?",
    "verifiable": "could public information tell which answer this person would like?",
}
KEYS = ["persona_id", "question_id"]
COLUMNS = [*KEYS, "name", "description", "kind", "axis", "question", *MEASURES]


class SheetError(ValueError):
    """A sheet that cannot be used as it is: says which rows, what was found and what was expected."""


def draw(personas: pd.DataFrame, questions: pd.DataFrame, seed: int, n_people: int = 10,
         n_questions: int = 10) -> pd.DataFrame:
    """An empty sheet: so many drawn people, and of the test questions of each so many, half personal.

    Fewer where there are fewer. Columns COLUMNS, all str; the ratings are "". The seed decides, not the order
    of rows. Source: Appendix A, ten questions of ten people's test split.
    """
    random, rows = Random(f"{seed} question check"), []
    test = questions[questions["split"] == "test"].sort_values("question_id")
    people = personas.sort_values("persona_id")
    for person in random.sample(list(people.itertuples()), min(n_people, len(people))):
        for kind in ("personal", "divergent"):
            asked = test["axis"].isin(person.axes) if kind == "divergent" else test["persona_id"] == person.persona_id
            pool = list(test[asked].itertuples())
            rows += [(person.persona_id, q.question_id, person.name, person.description, kind, q.axis, q.text, "", "")
                     for q in random.sample(pool, min(n_questions // 2, len(pool)))]
    return pd.DataFrame(rows, columns=COLUMNS)


def write(sheet: pd.DataFrame, path: Path) -> Path:
    """Write the sheet, unless the file holds its rows already: ratings are somebody's work.

    A file with other rows that has ratings is kept under another name, which is printed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        old = _load(path)
        if _same_rows(old, sheet):
            return path
        if not _unrated(old):
            kept = path.with_stem(f"{path.stem}-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}")
            print(f"{path.name} rates other questions than those of now; it is kept as {path.rename(kept)}")
    with atomic(path) as file:
        sheet[COLUMNS].map(_plain).to_csv(file, index=False, encoding="utf-8")
    return path


def read(path: Path, sheet: pd.DataFrame) -> pd.DataFrame:
    """The sheet with its ratings from the file, as int.

    sheet: as drawn; it says which rows there have to be. Raises SheetError for rows that are missing, unknown
    or repeated, for values off the scale, and for a sheet that is not filled in, wholly or in part.
    """
    found = _load(path)
    if problems := [*_wrong_rows(found, sheet), *_off_scale(found)]:
        raise SheetError(f"{path}: " + "; ".join(problems))
    blank = found[list(MEASURES)].eq("")
    if blank.to_numpy().any():
        where = found.loc[blank.any(axis=1), "question_id"].iloc[0]
        raise SheetError(f"{path}: {blank.to_numpy().sum()} of {blank.size} ratings are still empty, the first at "
                         f"{where}. Put {_scale()} into the columns {' and '.join(MEASURES)}, with the form or in "
                         "any editor, and run this cell again")
    ratings = found.set_index(KEYS)[list(MEASURES)].astype(float).astype(int)
    return sheet.drop(columns=list(MEASURES)).join(ratings, on=KEYS)


def table(ratings: pd.DataFrame) -> pd.DataFrame:
    """The layout of the paper's Table 4: mean ratings of each person, then their average and spread.

    ratings: name, kind, validity, verifiable. Returns name, a column for each kind and measure, and the rows
    "average" and "stdev" (over people, n - 1). 1 is best.
    """
    means = ratings.groupby(["name", "kind"])[list(MEASURES)].mean().unstack("kind")
    columns = [(measure, kind) for kind in ("personal", "divergent") for measure in MEASURES]
    wide = means.reindex(columns=columns).set_axis([f"{kind}, {measure}" for measure, kind in columns], axis=1)
    return pd.concat([wide, pd.DataFrame({"average": wide.mean(), "stdev": wide.std(ddof=1)}).T]).rename_axis(
        "name").reset_index()


def form(path: Path) -> ipywidgets.VBox:
    """A form on the file: one question at a time, two rows of buttons; every click is written to the file."""
    found, options = _load(path), [(f"{k} {word}", str(k)) for k, word in SCALE.items()]
    number = ipywidgets.BoundedIntText(1, min=1, max=max(len(found), 1), description="question")
    shown = ipywidgets.HTML()
    buttons = {name: ipywidgets.ToggleButtons(options=options, value=None, description=name) for name in MEASURES}

    def turn(_=None):
        row = found.loc[number.value - 1]
        rated = len(found) - found[list(MEASURES)].eq("").any(axis=1).sum()
        shown.value = (f"{rated} of {len(found)} rated · <b>{escape(row['name'])}</b>, {escape(row['description'])}"
                       f"<br>{escape(row['kind'])} ({escape(row['axis'])}): <b>{escape(row['question'])}</b>")
        for name, button in buttons.items():
            button.value = row[name] if row[name] in dict(options).values() else None

    def rate(change):
        name = change["owner"].description
        if change["new"] is not None and found.loc[number.value - 1, name] != change["new"]:
            found.loc[number.value - 1, name] = change["new"]
            with atomic(path) as file:
                found.to_csv(file, index=False, encoding="utf-8")

    number.observe(turn, "value")
    for button in buttons.values():
        button.observe(rate, "value")
    turn()
    asked = [ipywidgets.HTML(f"{name}: {escape(question)}") for name, question in MEASURES.items()]
    return ipywidgets.VBox([number, shown, *chain(*zip(asked, buttons.values(), strict=True))])


def _load(path: Path) -> pd.DataFrame:
    """The file's rows as they stand, all str; also as spreadsheets save them, with ";" and a byte-order mark."""
    if not path.exists():
        raise SheetError(f"no sheet at {path}; notebook 02 writes it")
    header = path.read_text(encoding="utf-8-sig").partition("\n")[0]
    separator = ";" if header.count(";") > header.count(",") else ","
    found = pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    if missing := [column for column in COLUMNS if column not in found]:
        raise SheetError(f"{path}: no column {', '.join(missing)}; expected {', '.join(COLUMNS)}. To start again, "
                         "move the file away and run notebook 02")
    return found.apply(lambda column: column.str.strip())


def _wrong_rows(found: pd.DataFrame, sheet: pd.DataFrame) -> Iterator[str]:
    there, wanted = list(_rows(found)), set(_rows(sheet))
    for what, rows in {"unknown": set(there) - wanted, "missing": wanted - set(there),
                       "repeated": {row for row in there if there.count(row) > 1}}.items():
        if rows:
            yield f"{len(rows)} rows are {what}, such as {' '.join(min(rows))}"


def _off_scale(found: pd.DataFrame) -> Iterator[str]:
    for measure in MEASURES:
        for line, value in enumerate(found[measure], start=2):
            if value and pd.to_numeric(value, errors="coerce") not in SCALE:
                yield f"line {line}: {measure} is {value!r}, expected {_scale()}"


def _rows(frame: pd.DataFrame) -> Iterator[tuple[str, ...]]:
    return frame[KEYS].itertuples(index=False, name=None)


def _same_rows(old: pd.DataFrame, sheet: pd.DataFrame) -> bool:
    same = [*KEYS, "question"]
    now = sheet[same].map(_plain)
    return set(old[same].itertuples(index=False, name=None)) == set(now.itertuples(index=False, name=None))


def _unrated(found: pd.DataFrame) -> bool:
    return found[list(MEASURES)].eq("").to_numpy().all()


def _plain(text: str) -> str:
    """A text that a spreadsheet does not take for a formula."""
    text = " ".join(str(text).split())
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def _scale() -> str:
    return ", ".join(f"{value} ({word})" for value, word in SCALE.items())
