"""Reference-free scores of preference pairs: how likely the policy finds each answer."""

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from helpers import chat, decoder, dpo, memory, models
from helpers.sharing import PAYS, Asked, Plan, Row, chunks, plan

TOKENS = {"cpu": 2048, "cuda": 16384}  # padded tokens of a batch: on a CPU few enough to stay near the processor
AT_ONCE = 1024  # pairs whose tokens are held in memory
Read = Callable[[torch.nn.Module, dict[str, torch.Tensor], dpo.Heads | None, decoder.Decoder | None], torch.Tensor]


class Pair(NamedTuple):
    """Token ids of one pair, ready for `dpo.pack`, and how many tokens had to be left out of it."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    lost: int  # of the prefix
    cut: int  # of question and answers that are too long even without a prefix


class Spelt(NamedTuple):
    """Token ids of a prompt and its answers, whole: the begin token or what a template opens with, prefix, question."""

    start: list[int]
    head: list[int]
    tail: list[int]
    answers: list[list[int]]


def score_pairs(model: torch.nn.Module, tokenizer, prompts: Iterable[tuple[str, str]], chosen: Iterable[str],
                rejected: Iterable[str], token_budget: int = 0, max_length: int = 512,
                dtype: str = "auto", side: str = "left", max_prompt: int = 0,
                soft: torch.Tensor | None = None, adapters: Sequence[str] | None = None) -> pd.DataFrame:
    """One row per pair, in input order.

    prompts: (head, tail) as from prefixes.prompt; the head, which holds the prefix, gives way to max_length
    and, if it is set, to max_prompt (see `encode`).
    token_budget: padded tokens of a batch; 0: what suits the device. soft: a vector for each pair [n, hidden],
    which stands as one more token right after the begin token (helpers.vpl). adapters: the name of one for
    each pair, of a model with several (models.load_adapters), "__base__" for none; a batch may mix them.
    Returns logp_chosen, logp_rejected (sums over an answer's tokens and the end token, nats), n_chosen,
    n_rejected (tokens), correct (`is_correct`), lost and cut (as in Pair). Source: WikiPersona 3.4.1, Eq. 3.
    """
    rows, parts, start = zip(prompts, chosen, rejected, strict=True), [], 0
    while (part := list(islice(rows, AT_ONCE))) or not parts:
        answers, at = [pair for _, *pair in part], slice(start, start := start + len(part))
        if parts:
            memory.give_back()  # else pieces pile up, and a long table needs more than a short one
        asked = encode(tokenizer, [prompt for prompt, *_ in part], answers, max_length, side, max_prompt, soft is not None)
        of_rows = soft[at] if soft is not None else None, adapters and adapters[at]
        sums = answer_sums(model, asked, token_budget, dtype, *of_rows).reshape(-1, 2)
        if len(bad := np.flatnonzero(~np.isfinite(sums).all(1))):
            raise FloatingPointError(
                f"pair {at.start + bad[0]} of {at.stop + sum(1 for _ in rows)} (chosen: {answers[bad[0]][0][:40]!r}) has "
                f"log-probabilities {sums[bad[0]].tolist()}: the model's weights are not finite; train or load it again")
        parts.append(table(asked, sums))
    return pd.concat(parts, ignore_index=True)


def table(asked: Sequence[Asked], sums: np.ndarray) -> pd.DataFrame:
    """What `score_pairs` returns of pairs, chosen first, and their sums of log-probabilities (nats) [n, 2]."""
    counts = np.array([[len(answer) for answer in one.answers] for one in asked], dtype=int).reshape(-1, 2)
    scores = pd.DataFrame({"logp_chosen": sums[:, 0], "logp_rejected": sums[:, 1],
                           "n_chosen": counts[:, 0], "n_rejected": counts[:, 1]}).assign(correct=is_correct)
    return scores.assign(lost=[one.lost for one in asked], cut=[one.cut for one in asked])


def answer_sums(model: torch.nn.Module, asked: Sequence[Asked], token_budget: int = 0, dtype: str = "auto",
                soft: torch.Tensor | None = None, adapters: Sequence[str] | None = None,
                pays: float = PAYS) -> np.ndarray:
    """Summed log-probability (nats) of every answer of every prompt, counted through in order [answers].

    Arguments as in `score_pairs` and `of_answers`.
    """
    return of_answers(model, asked, dpo.answer_logps, token_budget, dtype, soft, adapters, pays).astype(float)


@torch.inference_mode()
def of_answers(model: torch.nn.Module, asked: Sequence[Asked], read: Read, token_budget: int = 0,
               dtype: str = "auto", soft: torch.Tensor | None = None, adapters: Sequence[str] | None = None,
               pays: float = PAYS) -> np.ndarray:
    """What `read` finds of every answer of every prompt, counted through in order, float32 [answers, ...].

    Any number of answers a prompt. Nothing is computed twice: see sharing.plan, also for `pays`. Rows of like length
    share a batch, which is halved where memory is short. A soft vector belongs to its prompt alone, so that such
    prompts share nothing. read: dpo.answer_logps or another function of model, packed batch, cache and decoder, to [n, K, ...].
    """
    dpo.check_model(model)
    device = next(model.parameters()).device
    budget = token_budget or TOKENS[device.type]
    made = plan(asked, range(len(asked)) if soft is not None else adapters, pays)
    model.eval()
    with models.autocast(model, dtype), models.merged(model, adapters is None):
        fast = decoder.of(model) if adapters is None else None
        while True:
            try:
                return _read_all(model, made, read, budget, soft, adapters, fast)
            except torch.OutOfMemoryError:
                if budget <= max(row.length for row in made.rows):
                    raise
            budget = halved(budget, device.type)


def _read_all(model: torch.nn.Module, made: Plan, read: Read, budget: int, soft: torch.Tensor | None,
              adapters: Sequence[str] | None, fast: decoder.Decoder | None) -> np.ndarray:
    found: dict[int, np.ndarray] = {}
    for heads, rows in chunks(made, budget):
        with models.mixed(model, adapters and [made.keys[head] for head in heads]):
            cache = dpo.read_heads(model, [made.heads[head] for head in heads]) if heads else None
        place = {head: i for i, head in enumerate(heads)}
        for at in dpo.budget_batches([made.rows[i].length for i in rows], budget):
            batch = [made.rows[rows[i]] for i in dpo.filled(at)]
            starts = [len(made.heads[row.head]) for row in batch] if cache else ()
            packed = _packed(model, batch, starts, soft)
            behind = torch.tensor([place[row.head] for row in batch]) if cache else None
            behind = cache.behind(behind, packed["input_ids"].shape[1]) if cache else None
            with models.mixed(model, adapters and [row.key for row in batch]):
                values = read(model, packed, behind, fast).float().cpu().numpy()
            found |= {slot: value for row, of_row in zip(batch, values, strict=True)
                      for slots, value in zip(row.wanted, of_row, strict=False) for slot in slots}
    return np.array([found[slot] for slot in range(len(found))], dtype=np.float32)


def _packed(model: torch.nn.Module, rows: Sequence[Row], starts: Sequence[int],
            soft: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """The rows as a batch where the model is."""
    batch = dpo.pack([row.prompt for row in rows], [row.answers for row in rows], starts=starts)
    batch |= {} if soft is None else {"soft": soft[[row.key for row in rows]]}
    device = next(model.parameters()).device
    return {name: values.to(device) for name, values in batch.items()}


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
    """Token ids of each pair (see `encode`)."""
    answers = list(zip(chosen, rejected, strict=True))
    return [Pair(one.prompt, *one.answers, one.lost, one.cut)
            for one in encode(tokenizer, prompts, answers, max_length, side, max_prompt, soft)]


def encode(tokenizer, prompts: Sequence[tuple[str, str]], answers: Sequence[Sequence[str]], max_length: int,
           side: str = "left", max_prompt: int = 0, soft: bool = False) -> list[Asked]:
    """Token ids of each prompt, begin token, head, tail, and of its answers, each " " + text + end token.

    A model with a chat template finds them inside that (helpers.chat). A question keeps its last max_length / 2
    tokens and an answer its first ones beside it, whatever the prefix; a prefix has the room that is left (`fit`).
    max_prompt: tokens of begin token, prefix and question together, as the paper's max_prompt_len of 512
    (Appendix H); 0: no limit but max_length. Only the prefix gives way to it.
    soft: dpo.SOFT follows the begin token, or what a template opens with, in place of a token given as a vector.
    """
    return [cut(one, max_length, side, max_prompt, soft) for one in spell(tokenizer, prompts, answers)]


def spell(tokenizer, prompts: Sequence[tuple[str, str]], answers: Sequence[Sequence[str]]) -> list[Spelt]:
    """The whole token ids of each prompt and its answers, before anything is cut (see `encode`)."""
    said = iter(chat.encode_answers(tokenizer, [text for texts in answers for text in texts]))
    return [Spelt(*parts, [next(said) for _ in texts])
            for parts, texts in zip(chat.encode_prompts(tokenizer, prompts), answers, strict=True)]


def cut(one: Spelt, max_length: int, side: str = "left", max_prompt: int = 0, soft: bool = False) -> Asked:
    """A prompt and its answers, made to fit (see `encode`)."""
    start = one.start + [dpo.SOFT] * soft
    room = max_length - len(start)
    question = one.tail[-(room // 2):]
    kept = [answer[:room - len(question)] for answer in one.answers]
    prefix, lost = fit(one.head, question, kept, room, side, max_prompt and max(1, max_prompt - len(start)))
    short = sum(len(answer) - len(part) for answer, part in zip(one.answers, kept, strict=True))
    short += len(one.tail) - len(question)
    return Asked(start + prefix + question, kept, lost, short, len(start + prefix))


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

