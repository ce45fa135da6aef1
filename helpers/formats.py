"""Preference files that others wrote: which format a file has, and its rows one after the other, checked.

JSONL, JSON arrays, CSV (each also as .gz) and Parquet. Of a file of any size one row is held at a time, of Parquet
one batch.
"""

import codecs
import csv
import gzip
import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

MAX_CHARS = 20_000  # of one field: some 5,000 tokens, past what a training row can hold anyway
MAX_ROW = 2**24  # characters of one row of a JSON array
LOOK_AT = 100  # rows that may be broken before the format is given up
MIN_HISTORY = 3  # pairs: two are shown as shots, and a second draw has to differ
LEAK_WORDS = 8  # an answer of fewer words may stand anywhere by chance
UNFIT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")  # control characters and lone surrogates
DEMO, UGC, PAIRS = "Demographic Information", "User-Generated Content", "Pair-wise Comparative Feedback"
SIGNS = {"prism": [{"user_prompt", "model_response"}], "alignx": [{DEMO}, {UGC}, {PAIRS}], "trl": [{"chosen", "rejected"}]}
SPLITS = {"train": "train", "test": "test", "validation": "test", "val": "test", "dev": "test", "eval": "test"}
TRUE = ("true", "1", "yes")


class Row(NamedTuple):
    """A pair that somebody labelled. history: earlier pairs of the same person, as (prompt, chosen, rejected)."""

    user: str
    prompt: str
    chosen: str
    rejected: str
    split: str = ""  # train or test, where the file says so
    history: tuple[tuple[str, str, str], ...] = ()
    description: str = ""  # of the person, in words
    told: bool = False  # an answer stands in what the person wrote or chose before


class Interaction(NamedTuple):
    """The rated answers to one prompt, and the turns (prompt, chosen answer) of the conversation before it."""

    answers: list[dict]
    before: list[tuple[str, str]]


def detect(path: str | Path) -> str:
    """The format of a file, by the fields of its first readable row: trl, alignx or prism; trl if none is known."""
    for _, item in islice(_records(Path(path)), LOOK_AT):
        with suppress(ValueError):
            fields = decode(item).keys()
            for name, signs in SIGNS.items():
                if any(sign <= fields for sign in signs):
                    return name
    return "trl"


def units(path: str | Path, form: str) -> Iterator[tuple[int, Any]]:
    """(number, unit) for every pair of a file, in its order; `parse` makes a Row of a unit.

    number: the line of JSONL and CSV, the position in an array or a Parquet file, from 1; of PRISM's table, in
    which an answer is a row, that of the first answer. A line is handed on as it is: what nobody asks to parse
    costs next to nothing.
    """
    records = _records(Path(path))
    return _interactions(records) if form == "prism" else records


def parse(unit: Any, form: str) -> Row:
    """The pair of a unit. Raises ValueError with the reason for which it can't be used."""
    row = {"trl": _trl, "alignx": _alignx, "prism": _prism}[form](unit if form == "prism" else decode(unit))
    if row.chosen == row.rejected:
        raise ValueError("chosen equals rejected")
    return row


def decode(item: Any) -> dict:
    """The object that a line or a record holds. Raises ValueError where it is none."""
    if isinstance(item, ValueError):
        raise item
    if isinstance(item, bytes):
        try:
            item = json.loads(item.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8: byte {error.start + 1} is 0x{item[error.start]:02x}") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not JSON: {error}") from None
    if not isinstance(item, dict):
        raise ValueError(f"not an object: found {type(item).__name__}, expected {{...}}")
    return item


def printable(unit: Any) -> str:
    """A unit as text; bytes and control characters that a CSV can't hold become \\x escapes."""
    if isinstance(unit, Interaction):
        unit = unit.answers
    if isinstance(unit, ValueError):
        return ""
    text = unit.decode("utf-8", "backslashreplace").strip() if isinstance(unit, bytes) else json.dumps(unit, default=str)
    return UNFIT.sub(lambda found: f"\\x{ord(found.group()):02x}", text)


def _records(path: Path) -> Iterator[tuple[int, Any]]:
    """(number, record): a line as bytes, or a dict, or the ValueError that reading it raised."""
    kind = Path(path.name.removesuffix(".gz")).suffix
    if kind == ".parquet":
        yield from _parquet(path)
        return
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        if kind == ".csv":
            with io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="") as text:
                yield from _csv(text)
        elif kind == ".json" and file.peek(64).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[":
            with io.TextIOWrapper(file, "utf-8-sig", "surrogateescape") as text:
                yield from _array(text)
        else:
            for number, line in enumerate(file, start=1):
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if line.strip():
                    yield number, line


def _parquet(path: Path) -> Iterator[tuple[int, dict]]:
    batches = pq.ParquetFile(path).iter_batches(batch_size=1000)
    yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)


def _csv(text: io.TextIOBase) -> Iterator[tuple[int, Any]]:
    """Rows by the line on which they begin; a cell that is not there is no value."""
    rows = csv.DictReader(text, restkey="")
    while rows.fieldnames:
        number = rows.line_num + 1
        try:
            row = next(rows)
            yield number, ValueError("not CSV: more cells than columns") if "" in row else row
        except StopIteration:
            return
        except csv.Error as error:
            yield number, ValueError(f"not CSV: {error}")


def _array(text: io.TextIOBase) -> Iterator[tuple[int, Any]]:
    """The elements of a JSON array, by position; after one that is no JSON the rest can't be told apart."""
    decoder, separators = json.JSONDecoder(), re.compile(r"[\s,]*")
    buffer, number = text.read(MAX_ROW // 16).lstrip()[1:], 0
    while True:
        at = 0
        try:
            while True:
                value, end = decoder.raw_decode(buffer, separators.match(buffer, at).end())
                number, at = number + 1, end
                yield number, value
        except (ValueError, RecursionError) as error:
            buffer = buffer[at:]
            if separators.sub("", buffer, count=1).startswith("]"):
                return
            more = text.read(MAX_ROW // 16)
            if not more or len(buffer) > MAX_ROW:
                yield number + 1, ValueError(f"not JSON: {error}; nothing after it in the array was read")
                return
            buffer += more


def _interactions(records: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
    """PRISM's rows, an answer each, by the prompt that they answer; rows of a conversation lie together."""
    held, first, before = [], 0, []
    for number, item in records:
        try:
            row = decode(item)
            _ = row["user_prompt"], row["model_response"]
        except (ValueError, KeyError) as error:
            yield number, error if isinstance(error, ValueError) else ValueError(f"missing field: {error.args[0]}")
            continue
        if held and _turn(row) != _turn(held[0]):
            yield first, Interaction(held, before)
            before = [*before, _said(held)] if _talk(row) == _talk(held[0]) else []
            held = []
        first = first if held else number
        held = [*held, row]
    if held:
        yield first, Interaction(held, before)


def _talk(row: dict) -> tuple:
    return row.get("user_id", row.get("user")), row.get("conversation_id", row.get("interaction_id"))


def _turn(row: dict) -> tuple:
    return *_talk(row), row.get("interaction_id", row.get("turn")), row["user_prompt"]


def _said(answers: list[dict]) -> tuple[str, str]:
    """What was asked, and the answer with which the conversation went on."""
    chosen = [row for row in answers if str(row.get("if_chosen")).lower() in TRUE] or answers
    return str(answers[0]["user_prompt"]), str(chosen[0]["model_response"])


def _trl(row: dict) -> Row:
    """user, prompt, chosen, rejected: texts, or lists of messages; the prompt may stand in both answers alone."""
    user = _user(row)
    prompt, chosen, rejected = (row.get(field) for field in ("prompt", "chosen", "rejected"))
    if isinstance(chosen, list) and isinstance(rejected, list):
        shared = _shared(chosen, rejected)
        row = row | {"prompt": prompt or chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}
    texts = [_text(row, field) for field in ("prompt", "chosen", "rejected")]
    return Row(user, *texts, split=_split(row), description=_words(row.get("description")))


def _alignx(row: dict) -> Row:
    """AlignX: a pair, and what is known of its person: a description, comments and pairs on other posts.

    Rows have no user: those with the same person in front are one person's. The row's own pair is for testing.
    """
    texts, shots = [_text(row, field) for field in ("prompt", "chosen", "rejected")], row.get(PAIRS) or []
    history = tuple(_shot(pair, k) for k, pair in enumerate(shots, start=1))
    if len(history) < MIN_HISTORY:
        raise ValueError(f"history too short: {len(history)} pairs, expected {MIN_HISTORY} or more")
    comments = [_words(ugc.get("comment")) for ugc in row.get(UGC) or [] if isinstance(ugc, dict)]
    about = _words(row.get(DEMO)) or "\n".join(f"Wrote: {comment}" for comment in comments if comment)
    known = json.dumps([history, about, comments]).encode()
    user = _user(row) if "user" in row or "user_id" in row else f"person-{hashlib.sha256(known).hexdigest()[:12]}"
    before = "\n".join([about, *comments, *(text for pair in history for text in pair)])
    told = any(len(text.split()) >= LEAK_WORDS and text in before for text in texts[1:])
    return Row(user, *texts, split="test", history=history, description=about, told=told)


def _prism(unit: Any) -> Row:
    """An interaction: the chosen answer (or that of highest score) against the one of lowest score."""
    if isinstance(unit, ValueError):
        raise unit
    user, split = _user(unit.answers[0]), _split(unit.answers[0])
    if len(unit.answers) < 2:
        raise ValueError("one answer only: nothing to compare it with")
    turns = [m for asked, said in unit.before for m in (_message("user", asked), _message("assistant", said))]
    prompt = {"prompt": [*turns, _message("user", unit.answers[0]["user_prompt"])]}
    marked = [row for row in unit.answers if str(row.get("if_chosen")).lower() in TRUE]
    best = marked[0] if marked else max(unit.answers, key=_score)
    worst = min((row for row in unit.answers if row is not best), key=_score)
    if _score(best) <= _score(worst):
        raise ValueError(f"no preference: the chosen answer's score is {_score(best):g}, the lowest {_score(worst):g}")
    return Row(user, _text(prompt, "prompt"), *(_text(row, "model_response") for row in (best, worst)), split=split)


def _score(row: dict) -> float:
    try:
        return float(row.get("score"))
    except (TypeError, ValueError):
        raise ValueError(f"no score: {row.get('score')!r}, expected a number") from None


def _user(row: dict) -> str:
    user = row.get("user", row.get("user_id"))
    return _text({"user": str(user) if isinstance(user, int) and not isinstance(user, bool) else user}, "user")


def _split(row: dict) -> str:
    return SPLITS.get(str(row.get("split", "")).lower(), "")


def _words(value: Any) -> str:
    """Free text about a person: white space trimmed, control characters gone, no longer than a field may be."""
    return UNFIT.sub("", str(value or "")).strip()[:MAX_CHARS]


def _shot(pair: Any, number: int) -> tuple[str, str, str]:
    if not isinstance(pair, dict):
        raise ValueError(f"history: pair {number} is {type(pair).__name__}, expected an object")
    try:
        prompt, chosen, rejected = (_text(pair, field) for field in ("prompt", "chosen", "rejected"))
    except ValueError as error:
        raise ValueError(f"history: pair {number}, {error}") from None
    if chosen == rejected:
        raise ValueError(f"history: pair {number}, chosen equals rejected")
    return prompt, chosen, rejected


def _shared(chosen: list, rejected: list) -> int:
    """How many messages two conversations begin with in common, their last ones aside."""
    n, most = 0, min(len(chosen), len(rejected)) - 1
    while n < most and chosen[n] == rejected[n]:
        n += 1
    return n


def _message(role: str, content: Any) -> dict:
    return {"role": role, "content": content}


def _transcript(messages: list, field: str) -> str:
    """One message is its content; several are told with who says what."""
    for k, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError(f"not a message: {field}[{k}], expected {{role, content}} with a text")
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{str(m.get('role', 'user')).capitalize()}: {m['content']}" for m in messages)


def _text(row: dict, field: str) -> str:
    """A field as text, outer white space removed. Raises ValueError with what is wrong with it."""
    value = row.get(field)
    if value is None:
        raise ValueError(f"missing field: {field}")
    value = _transcript(value, field) if isinstance(value, list) else value
    if not isinstance(value, str):
        raise ValueError(f"not a string: {field} is {type(value).__name__}")
    if not value.strip():
        raise ValueError(f"empty field: {field}")
    if len(value) > MAX_CHARS:
        raise ValueError(f"over-long text: {field} has {len(value)} characters, over {MAX_CHARS}")
    if unfit := UNFIT.search(value):
        raise ValueError(f"control character: {field} holds U+{ord(unfit.group()):04X} at {unfit.start() + 1}")
    return value.strip()


def save(preferences: Any, personas: Any, path: Path, form: str) -> Path:
    """Write a run's pairs as others write them; a user is a persona_id. preferences, personas: the tables.

    trl: JSONL. prism: CSV, a row an answer. alignx: a JSON array, a row a test pair, with the person's first four
    train pairs as history and the description.
    """
    rows = preferences.rename(columns={"persona_id": "user"})
    if form == "trl":
        rows[["user", "prompt", "chosen", "rejected"]].to_json(path, orient="records", lines=True, force_ascii=False)
    elif form == "prism":
        with path.open("w", newline="", encoding="utf-8") as file:
            out = csv.writer(file)
            out.writerow(["user_id", "conversation_id", "interaction_id", "user_prompt", "model_response", "score",
                          "if_chosen"])
            for row in rows.itertuples():
                out.writerow([row.user, row.pair_id, row.pair_id, row.prompt, row.chosen, 100, True])
                out.writerow([row.user, row.pair_id, row.pair_id, row.prompt, row.rejected, 1, False])
    else:
        about = personas.set_index("persona_id")["description"]
        before = {user: own.head(4)[["prompt", "chosen", "rejected"]].to_dict("records")
                  for user, own in rows[rows["split"] == "train"].groupby("user")}
        path.write_text(json.dumps([
            {"user": row.user, "prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected, DEMO: about[row.user],
             UGC: [], PAIRS: before.get(row.user, [])} for row in rows[rows["split"] == "test"].itertuples()], indent=1))
    return path
