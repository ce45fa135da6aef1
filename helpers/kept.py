"""Vectors that are computed once for each text: in batches, kept in a file, so that a killed run does not pay twice."""

import hashlib
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

BAR_FROM = 20_000  # texts


def vectors(texts: Sequence[str], compute: Callable[[list[str]], np.ndarray], batch: int, file: Path | None = None,
            of: str = "", desc: str = "texts") -> np.ndarray:
    """compute(texts) as float32 [n, d], a batch at a time; a text that occurs twice is computed once.

    Batches hold texts of like length and are the same however often a run was interrupted: one that is not whole in
    the file is computed whole, so the numbers do not depend on interruptions. file: an sqlite file, made if need be;
    None: nothing is kept. of: the model's name; another one shares the file and no value.
    """
    known = list(dict.fromkeys(texts))
    order = sorted(range(len(known)), key=lambda i: len(known[i]))
    found: dict[str, np.ndarray] = {}
    with closing(_open(file)) as kept, tqdm(total=len(known), desc=desc, unit="text", disable=len(known) < BAR_FROM) as bar:
        for part in _batches([known[i] for i in order], batch):
            found |= _one_batch(part, compute, kept, of)
            bar.update(len(part))
    return np.stack([found[text] for text in texts]) if texts else np.zeros((0, 0), dtype=np.float32)


def _one_batch(part: list[str], compute: Callable[[list[str]], np.ndarray], kept: sqlite3.Connection,
               of: str) -> dict[str, np.ndarray]:
    keys = [hashlib.sha256(f"{of}\0{text}".encode()).digest() for text in part]
    marks = ",".join("?" * len(keys))
    there = dict(kept.execute(f"SELECT text, vector FROM kept WHERE text IN ({marks})", keys))
    if len(there) == len(keys):
        return {text: np.frombuffer(there[key], np.float32) for text, key in zip(part, keys, strict=True)}
    made = np.asarray(compute(part), dtype=np.float32).reshape(len(part), -1)
    with kept:  # one transaction: a batch is there or not
        kept.executemany("INSERT OR REPLACE INTO kept VALUES (?, ?)",
                         [(key, row.tobytes()) for key, row in zip(keys, made, strict=True)])
    return dict(zip(part, made, strict=True))


def _open(file: Path | None) -> sqlite3.Connection:
    connection = sqlite3.connect(file or ":memory:")
    connection.execute("PRAGMA journal_mode = WAL")  # a killed process leaves whole batches, and no wait for the disk
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("CREATE TABLE IF NOT EXISTS kept (text BLOB PRIMARY KEY, vector BLOB) WITHOUT ROWID")
    return connection


def _batches(texts: list[str], size: int) -> Iterator[list[str]]:
    return (texts[i:i + size] for i in range(0, len(texts), size))
