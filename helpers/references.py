"""What the untrained policy makes of the pairs: computed once for a prompt and an answer, kept in one table.

DPO compares with it at every step, and it never changes: folds, seeds, epochs, people with the same prompt and
several notebooks share its numbers.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from helpers import ROOT, artifacts, dpo, fingerprint, grid, models, scoring

CHUNK = 512  # rows that are computed and written together
CODE = ("dpo", "models", "references", "scoring")  # what the numbers follow from, beside the model


def score(rows: pd.DataFrame, policy: Any, side: str, folder: Path, workers: int = 1, executor: str = "loky",
          desc: str = "references") -> pd.DataFrame:
    """The untrained policy's scores of `rows`, as training.read_scores gives those of an adapter.

    rows: head, tail (as from prefixes.prompt), chosen, rejected; other columns stand in the result as they are.
    policy: section of a profile; side: prefixes.side. folder: the table, in parts (key, logp in nats); what is in
    it is not computed again, and what a killed run has finished is.
    """
    prompts = list(zip(rows["head"], rows["tail"], strict=True))
    tokenizer = models.load_tokenizer(policy.path, policy.revision, policy.chat)
    pairs = scoring.encode_pairs(tokenizer, prompts, rows["chosen"], rows["rejected"],
                                 policy.max_length, side, policy.max_prompt)
    known, made_by = _read(folder), _made_by(policy)
    keys = [tuple(_key(made_by, p.prompt, answer) for answer in p[1:3]) for p in pairs]
    todo = list(_missing(pairs, keys, known))
    parts = [partial(_compute, policy, todo[i:i + CHUNK], folder) for i in range(0, len(todo), CHUNK)]
    for found in grid.run_units(parts, workers, executor if len(parts) > 1 else "sequential", desc, "part"):
        known |= found
    found = [(*(known[key] for key in both), len(p.chosen), len(p.rejected), p.lost, p.cut)
             for p, both in zip(pairs, keys, strict=True)]
    columns = ["logp_chosen", "logp_rejected", "n_chosen", "n_rejected", "lost", "cut"]
    scores = pd.DataFrame(found, columns=columns).assign(correct=scoring.is_correct)
    kept = rows.drop(columns=["head", "tail", "chosen", "rejected"]).reset_index(drop=True)
    return pd.concat([kept, scores], axis=1)


def _missing(pairs: Sequence[scoring.Pair], keys: Sequence[tuple[str, str]],
             known: dict[str, float]) -> Iterator[tuple[list[int], list[list[int]], list[str]]]:
    """Rows to compute: a prompt, two of its answers that nobody knows yet, and their keys; a last one twice."""
    waiting: dict[tuple[int, ...], dict[str, list[int]]] = {}
    for pair, both in zip(pairs, keys, strict=True):
        new = {key: answer for key, answer in zip(both, pair[1:3], strict=True) if key not in known}
        waiting.setdefault(tuple(pair.prompt), {}).update(new)
    for prompt, answers in waiting.items():
        names = list(answers)
        for two in (names[i:i + 2] for i in range(0, len(names), 2)):
            two = two * (2 // len(two))
            yield list(prompt), [answers[name] for name in two], two


def _compute(policy: Any, rows: Sequence[tuple], folder: Path) -> dict[str, float]:
    """The sum of log-probabilities of each key, nats; written to a part of the table, too."""
    (model, _), found = _base(policy), {}
    prompts, answers, keys = zip(*rows, strict=True)
    lengths = [dpo.row_length(p, a) for p, a in zip(prompts, answers, strict=True)]
    with models.one_thread(), torch.inference_mode():
        for at in dpo.budget_batches(lengths, dpo.TOKEN_BUDGET[model.device.type]):
            batch = dpo.pack([prompts[i] for i in at], [answers[i] for i in at])
            with models.autocast(model, policy.dtype):
                sums = dpo.answer_logps(model, {name: part.to(model.device) for name, part in batch.items()})
            found |= {key: value for i, row in zip(at, sums.tolist(), strict=True)
                      for key, value in zip(keys[i], row, strict=True)}
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
    code = [fingerprint.digest(ROOT / "helpers" / f"{name}.py") for name in CODE]
    weights = fingerprint.digest(ROOT / Path(policy.path).expanduser())
    return _digest([policy.path, weights, policy.dtype, str(policy.load_in_4bit), *code])


def _key(made_by: str, prompt: Sequence[int], answer: Sequence[int]) -> str:
    tokens = [hashlib.sha256(np.asarray(ids, np.int64).tobytes()).hexdigest() for ids in (prompt, answer)]
    return _digest([made_by, *tokens])


def _digest(words: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:32]


@lru_cache(maxsize=1)
def _base(policy: Any) -> tuple[torch.nn.Module, Any]:
    """Loaded once in the life of a worker."""
    return models.load_policy(policy)
