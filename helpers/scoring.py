"""Reference-free scores of preference pairs: how likely the policy finds each answer."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from helpers import dpo, models


class Pair(NamedTuple):
    """Token ids of one pair, ready for `dpo.pack`, and how many tokens had to be left out of it."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    lost: int  # of the prefix
    cut: int  # of question and answers that are too long even without a prefix


@torch.inference_mode()
def score_pairs(model: torch.nn.Module, tokenizer, prompts: Sequence[tuple[str, str]], chosen: Sequence[str],
                rejected: Sequence[str], token_budget: int = 0, max_length: int = 512,
                dtype: str = "auto", side: str = "left", max_prompt: int = 0,
                soft: torch.Tensor | None = None) -> pd.DataFrame:
    """One row per pair, in input order.

    prompts: (head, tail) as from prefixes.prompt; the head, which holds the prefix, gives way to max_length
    and, if it is set, to max_prompt (see `encode_pairs`).
    token_budget: padded tokens of a batch; 0: what suits the device. soft: a vector for each pair [n, hidden],
    which stands as one more token right after the begin token (helpers.vpl).
    Returns logp_chosen, logp_rejected (sums over an answer's tokens and the end token, nats), n_chosen,
    n_rejected (tokens), correct (`is_correct`), lost and cut (as in Pair). Source: WikiPersona 3.4.1, Eq. 3.
    """
    dpo.check_model(model)
    pairs = encode_pairs(tokenizer, prompts, chosen, rejected, max_length, side, max_prompt, soft is not None)
    columns, device = np.zeros((len(pairs), 4)), next(model.parameters()).device
    lengths, budget = [dpo.row_length(p.prompt, p[1:3]) for p in pairs], token_budget
    model.eval()
    budget = budget or dpo.TOKEN_BUDGET[device.type]
    batches = dpo.budget_batches(lengths, budget)
    while batches:
        at = batches.pop(0)
        batch = dpo.pack([pairs[i].prompt for i in at], [pairs[i][1:3] for i in at])
        batch |= {} if soft is None else {"soft": soft[torch.from_numpy(at)]}
        try:
            with models.autocast(model, dtype):
                found = dpo.pair_logps(model, {name: values.to(device) for name, values in batch.items()})
        except torch.OutOfMemoryError:
            if len(at) == 1:
                raise
            budget, left = halved(budget, device.type), np.concatenate([at, *batches])
            batches = [left[own] for own in dpo.budget_batches([lengths[i] for i in left], budget)]
            continue
        columns[at] = torch.stack([values.double() for values in found], 1).cpu().numpy()
    if len(bad := np.flatnonzero(~np.isfinite(columns).all(1))):
        raise FloatingPointError(f"pair {bad[0]} of {len(pairs)} (chosen: {list(chosen)[bad[0]][:40]!r}) has log-probabilities "
                                 f"{columns[bad[0], :2].tolist()}: the model's weights are not finite; train or load it again")
    scores = pd.DataFrame(columns, columns=["logp_chosen", "logp_rejected", "n_chosen", "n_rejected"])
    scores = scores.astype({"n_chosen": int, "n_rejected": int}).assign(correct=is_correct)
    return scores.assign(lost=[p.lost for p in pairs], cut=[p.cut for p in pairs])


def halved(token_budget: int, device: str) -> int:
    """Half the tokens of a batch, after an out-of-memory error; says so, and gives back what torch keeps."""
    print(f"out of memory on the {device} with {token_budget} tokens a batch: going on with {token_budget // 2}", flush=True)
    if device == "cuda":
        torch.cuda.empty_cache()
    return max(1, token_budget // 2)


def is_correct(scores: pd.DataFrame) -> pd.Series:
    """Whether the mean log-probability of chosen's tokens is above rejected's; a tie is wrong (Eq. 3)."""
    return scores["logp_chosen"] / scores["n_chosen"] > scores["logp_rejected"] / scores["n_rejected"]


def encode_pairs(tokenizer, prompts: Sequence[tuple[str, str]], chosen: Sequence[str],
                 rejected: Sequence[str], max_length: int, side: str = "left", max_prompt: int = 0,
                 soft: bool = False) -> list[Pair]:
    """Token ids of each pair: begin token, head, tail, and each answer as " " + text + end token.

    Each part is tokenised on its own. A question keeps its last max_length / 2 tokens and an answer its first
    ones beside it, whatever the prefix; a prefix has the room that is left (`fit`).
    max_prompt: tokens of begin token, prefix and question together, as the paper's max_prompt_len of 512
    (Appendix H); 0: no limit but max_length. Only the prefix gives way to it.
    soft: dpo.SOFT follows the begin token, in place of a token that is given as a vector.
    """
    heads, tails = (_ids(tokenizer, (prompt[part] for prompt in prompts)) for part in (0, 1))
    answers = [_ids(tokenizer, (f" {text}" for text in texts)) for texts in (chosen, rejected)]
    start, end = [i for i in [tokenizer.bos_token_id] if i is not None], [tokenizer.eos_token_id]
    start += [dpo.SOFT] * soft
    room, pairs = max_length - len(start), []
    for head, tail, *both in zip(heads, tails, *answers, strict=True):
        question = tail[-(room // 2):]
        kept = [(answer + end)[:room - len(question)] for answer in both]
        prefix, lost = fit(head, question, kept, room, side, max_prompt and max(1, max_prompt - len(start)))
        cut = sum(len(answer) + 1 - len(part) for answer, part in zip(both, kept, strict=True))
        cut += len(tail) - len(question)
        pairs.append(Pair(start + prefix + question, *kept, lost, cut))
    return pairs


def fit(prefix_ids: Sequence[int], rest_ids: Sequence[int], answers: Sequence[Sequence[int]], max_length: int,
        side: str = "left", max_prompt: int = 0) -> tuple[list[int], int]:
    """The part of a prefix that fits before question and longest answer, and how many tokens of it are lost.

    side: the end of the prefix that gives way. max_prompt: limit of prefix and question alone; 0: none.
    Question and answers are never cut for a prefix's sake, so all prefixes of a person are compared on the
    same answers.
    """
    room = max_length - len(rest_ids) - max(map(len, answers))
    if max_prompt:
        room = min(room, max_prompt - len(rest_ids))
    lost = max(0, len(prefix_ids) - max(0, room))
    return list(prefix_ids[lost:] if side == "left" else prefix_ids[:len(prefix_ids) - lost]), lost


def _ids(tokenizer, texts: Iterable[str]) -> list[list[int]]:
    """Token ids of each text; one that occurs often, as prefixes do, is tokenised once."""
    texts = list(texts)
    known = list(dict.fromkeys(texts))
    ids = tokenizer(known, add_special_tokens=False)["input_ids"] if known else []
    table = dict(zip(known, ids, strict=True))
    return [table[text] for text in texts]
