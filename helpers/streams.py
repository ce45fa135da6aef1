"""Scores of tables of any length: read in chunks, written in parts, and continued where it stopped."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from threading import Lock, local
from typing import Any

import pandas as pd
import pyarrow.parquet as pq

from helpers import grid, models, scoring
from helpers.artifacts import atomic

TEXTS = ["head", "tail", "chosen", "rejected"]
NAMES = "[0-9]" * 6 + "-*.parquet"  # of parts; no other file in their folder is touched
MIXED = {"cpu": 0, "cuda": 64}  # pairs for each adapter below which they share batches
_mine, _loading = local(), Lock()  # a model for each thread; adapters are loaded by one thread at a time


def score_table(source: str | Path | Iterable[pd.DataFrame], out: str | Path, policy: Any,
                adapters: Mapping[str, str | Path] | None = None, side: str = "left", rows: int = 2048,
                workers: int = 1, executor: str = "loky", desc: str = "parts") -> Path:
    """Score all pairs of a table; `out` becomes a folder of Parquet files, which pandas reads as one table.

    source: a Parquet or JSONL file, read `rows` at a time, or an iterable of tables, a part each. Columns:
    chosen, rejected, and head and tail (as from prefixes.prompt) or prompt; policy_id, where an adapter of
    that name scores; other columns come back beside what scoring.score_pairs returns. policy: section of a
    profile. adapters: policy_id -> folder; without one, the base scores. workers: parts at a time, each in one
    thread of this process, or, with executor "ray", of a cluster's.
    A part appears when it is finished. A part that is there is not computed again unless its rows or these
    settings are others, so that a run that was stopped ends with the bytes of one that was not.
    """
    out, made, shown = Path(out), set(), dict(adapters or {})
    out.mkdir(parents=True, exist_ok=True)
    settings = [policy.path, policy.max_length, policy.max_prompt, policy.dtype, policy.load_in_4bit, side]

    def parts() -> Iterator[partial]:
        for i, table in enumerate(read_chunks(source, rows)):
            used = {name: str(shown[name]) for name in sorted(set(table.get("policy_id", ()))) if name in shown}
            file = out / f"{i:06d}-{_digest(table, settings + [used])}.parquet"
            made.add(file)
            yield partial(_score_part, table, file, policy, used, side)

    units = list(parts()) if hasattr(source, "__len__") and not isinstance(source, str) else parts()
    with models.one_thread():
        grid.run_units(units, workers, "threading" if executor == "loky" else executor, desc, "part")
    _mine.__dict__.clear()
    for other in {*out.glob(NAMES), *out.glob(f".{NAMES}.*")} - made:  # of another table, or of a killed process
        other.unlink()
    return out


def read_chunks(source: str | Path | Iterable[pd.DataFrame], rows: int) -> Iterator[pd.DataFrame]:
    """Tables of at most so many rows from a file, never the whole of it in memory; or the tables of an iterable.

    Raises ValueError for a file that is neither Parquet nor JSONL, and for missing columns.
    """
    if not isinstance(source, str | Path):
        tables = iter(source)
    elif Path(source).suffix == ".parquet":
        tables = (part.to_pandas() for part in pq.ParquetFile(source).iter_batches(rows))
    elif Path(source).suffix in (".jsonl", ".json"):
        tables = pd.read_json(source, lines=True, chunksize=rows, dtype=False)
    else:
        raise ValueError(f"{source}: expected a table as .parquet or .jsonl (an object a line)")
    for table in tables:
        table = table if "tail" in table or "prompt" not in table else table.assign(head="", tail=table["prompt"])
        if lacking := [name for name in TEXTS if name not in table]:
            raise ValueError(f"a table to score has no {', '.join(lacking)}; expected head and tail, or prompt, "
                             "and chosen and rejected")
        yield table.reset_index(drop=True)


def _score_part(rows: pd.DataFrame, file: Path, policy: Any, adapters: Mapping[str, str], side: str) -> None:
    if file.exists():
        return
    with models.one_thread():
        found = _score(rows, policy, adapters, side)
    with atomic(file) as part:
        found.to_parquet(part, index=False)


def _score(rows: pd.DataFrame, policy: Any, adapters: Mapping[str, str], side: str) -> pd.DataFrame:
    """The part's pairs by each row's own adapter: one adapter after the other, or in mixed batches."""
    base, tokenizer = _base(policy)
    whose = rows["policy_id"].where(rows["policy_id"].isin(list(adapters)), "") if adapters else None
    ask = partial(_score_rows, tokenizer=tokenizer, policy=policy, side=side)
    if whose is None:
        return ask(base, rows)
    if len(rows) < MIXED[next(base.parameters()).device.type] * whose.nunique():
        number = {name: f"a{i}" for i, name in enumerate(adapters)}  # peft takes no names with a dot
        with _adapted(base, {number[name]: path for name, path in adapters.items()}) as model:
            return ask(model, rows, adapters=[number.get(name, "__base__") for name in whose])
    parts = []
    for name, part in rows.groupby(whose, sort=False):
        with _adapted(base, {"default": adapters[name]} if name else {}) as model:
            parts.append(ask(model, part).set_axis(part.index))
    return pd.concat(parts).sort_index()


def _score_rows(model, rows: pd.DataFrame, tokenizer, policy: Any, side: str, **more: Any) -> pd.DataFrame:
    found = scoring.score_pairs(model, tokenizer, zip(rows["head"], rows["tail"], strict=True), rows["chosen"],
                                rows["rejected"], max_length=policy.max_length, dtype=policy.dtype, side=side,
                                max_prompt=policy.max_prompt, **more)
    kept = rows.drop(columns=[*TEXTS, *({"prompt"} & set(rows))]).reset_index(drop=True)
    return pd.concat([kept, found], axis=1)


@contextmanager
def _adapted(base, adapters: Mapping[str, str]) -> Iterator[Any]:
    """models.adapted, but one thread at a time puts adapters on its base."""
    with ExitStack() as stack:
        with _loading:
            model = stack.enter_context(models.adapted(base, adapters))
        yield model


def _base(policy: Any) -> tuple:
    """Loaded once in the life of a thread: an adapter on one thread's model is none on another's."""
    if getattr(_mine, "policy", None) != policy:
        with _loading:
            _mine.loaded, _mine.policy = models.load_policy(policy), policy
    return _mine.loaded


def _digest(table: pd.DataFrame, settings: list) -> str:
    """Of a part's rows and what they are scored with."""
    rows = table.to_json(orient="split", double_precision=15)
    return hashlib.sha256((json.dumps(settings) + rows).encode()).hexdigest()[:16]
