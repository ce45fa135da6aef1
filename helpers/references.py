"""What the untrained policy makes of the pairs: computed once for a prompt and an answer, kept in one table.

DPO compares with it at every step, and it never changes: folds, seeds, epochs, people with the same prompt and
several notebooks share its numbers.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from helpers import ROOT, artifacts, fingerprint, grid, models, scoring
from helpers.sharing import Asked

CHUNK = 512  # prompts that are computed and written together


def score(rows: pd.DataFrame, policy: Any, side: str, folder: Path, workers: int = 1, executor: str = "loky",
          desc: str = "references") -> pd.DataFrame:
    """The untrained policy's scores of `rows`, as training.read_scores gives those of an adapter.

    rows: head, tail (as from prefixes.prompt), chosen, rejected; other columns stand in the result as they are.
    policy: section of a profile; side: prefixes.side. folder: the table, in parts (key, logp in nats); what is in
    it is not computed again, and what a killed run has finished is.
    """
    prompts = list(zip(rows["head"], rows["tail"], strict=True))
    answers = list(zip(rows["chosen"], rows["rejected"], strict=True))
    tokenizer = models.load_tokenizer(policy.path, policy.revision, policy.chat)
    asked = scoring.encode(tokenizer, prompts, answers, policy.max_length, side, policy.max_prompt)
    known, made_by = _read(folder), _made_by(policy)
    keys = [[_key(made_by, one.prompt, answer) for answer in one.answers] for one in asked]
    todo = _missing(asked, keys, known)
    parts = [partial(_compute, policy, todo[i:i + CHUNK], folder) for i in range(0, len(todo), CHUNK)]
    for found in grid.run_units(parts, workers, executor if len(parts) > 1 else "sequential", desc, "part"):
        known |= found
    sums = np.array([[known[key] for key in both] for both in keys]).reshape(-1, 2)
    kept = rows.drop(columns=["head", "tail", "chosen", "rejected"]).reset_index(drop=True)
    return pd.concat([kept, scoring.table(asked, sums)], axis=1)


def _missing(asked: Sequence[Asked], keys: Sequence[Sequence[str]],
             known: Mapping[str, float]) -> list[tuple[Asked, list[str]]]:
    """Each prompt once, with those of its answers that nobody knows yet, and their keys; a head's prompts in a row."""
    waiting: dict[tuple[int, ...], tuple[Asked, dict[str, list[int]]]] = {}
    for one, names in zip(asked, keys, strict=True):
        _, new = waiting.setdefault(tuple(one.prompt), (one, {}))
        new |= {key: answer for key, answer in zip(names, one.answers, strict=True) if key not in known}
    todo = [(one._replace(answers=list(new.values())), list(new)) for one, new in waiting.values() if new]
    return sorted(todo, key=lambda row: row[0].prompt[:row[0].head])


def _compute(policy: Any, rows: Sequence[tuple[Asked, list[str]]], folder: Path) -> dict[str, float]:
    """The sum of log-probabilities of each key, nats; written to a part of the table, too."""
    (model, _), (asked, keys) = models.base(policy), zip(*rows, strict=True)
    with models.one_thread():
        sums = scoring.answer_sums(model, asked, dtype=policy.dtype)
    found = dict(zip(chain.from_iterable(keys), sums.tolist(), strict=True))
    table = pd.DataFrame(sorted(found.items()), columns=["key", "logp"])
    folder.mkdir(parents=True, exist_ok=True)
    with artifacts.atomic(folder / f"{_digest(table['key'])}.parquet") as file:
        table.to_parquet(file, index=False)
    return found


def _read(folder: Path) -> dict[str, float]:
    parts = [pd.read_parquet(file) for file in sorted(folder.glob("*.parquet"))]
    return {key: value for part in parts for key, value in zip(part["key"], part["logp"], strict=True)}


def _made_by(policy: Any) -> str:
    """What the numbers follow from beside the tokens: the model's files or its name, precision, our code."""
    code = [fingerprint.digest(ROOT / path) for path in sorted(fingerprint.modules("from helpers import scoring").values())]
    code.append(fingerprint.digest(Path(__file__)))
    weights = fingerprint.digest(ROOT / Path(policy.path).expanduser())
    return _digest([policy.path, weights, policy.dtype, str(policy.load_in_4bit), *code])


def _key(made_by: str, prompt: Sequence[int], answer: Sequence[int]) -> str:
    tokens = [hashlib.sha256(np.asarray(ids, np.int64).tobytes()).hexdigest() for ids in (prompt, answer)]
    return _digest([made_by, *tokens])


def _digest(words: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:32]
