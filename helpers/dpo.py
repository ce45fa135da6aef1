"""DPO in plain torch: the loss, the implicit reward, and rows that hold a prompt once for all its answers.

A row is prompt[:-1] + (last prompt token + answer 1) + (last prompt token + answer 2) ... Each answer's
positions restart where the prompt ends and no answer sees another, so a row gives the log-probabilities of
one row per answer, and the prompt is computed once. What several prompts begin with can be computed once for
all of them (`read_heads`): their rows then hold the rest.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, pad
from transformers import AttentionInterface, DynamicCache

from helpers.decoder import FEW_LOGITS, Decoder
from helpers.line import IGNORE, LINE, SOFT, WIDTH

ROWS = 4  # a batch of more rows has a multiple of it: few shapes, for each costs a new kernel and memory
TOKEN_BUDGET = {"cpu": 4096, "cuda": 16384}  # padded tokens of a micro-batch in training; scoring.TOKENS: without gradients
SHORT = 512  # tokens of a row up to which a score for every pair of tokens is a small thing to keep
LOGITS = {"cpu": FEW_LOGITS, "cuda": 2**27}  # at a time without gradients
AFTER_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


def pack(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[Sequence[int]]],
         multiple: int = WIDTH, starts: Sequence[int] = ()) -> dict[str, Tensor]:
    """Rows of a batch, padded on the right to a multiple of `multiple`: few shapes, for each costs a new kernel.

    prompts: n lists of token ids, none empty; answers: for each its answers, at most K, end token included.
    starts: the position of each prompt's first token, where a head stands in front; else 0.
    Returns, as int64: input_ids, position_ids, segments (0 prompt, 1 ... K answer, -1 padding) and targets
    (the token to predict, or IGNORE), each [n, L]; counts [n, K], the tokens of each answer.
    """
    longest = max(row_length(p, a) for p, a in zip(prompts, answers, strict=True))
    shape = (len(prompts), -(-longest // multiple) * multiple)
    empty = {"input_ids": 0, "position_ids": 0, "segments": -1, "targets": IGNORE}
    batch = {name: np.full(shape, fill, dtype=np.int64) for name, fill in empty.items()}
    batch["counts"] = np.zeros((len(prompts), max(map(len, answers))), dtype=np.int64)
    for i, (prompt, row) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) - 1
        batch["input_ids"][i, :end], batch["segments"][i, :end] = prompt[:-1], 0
        batch["position_ids"][i, :end] = np.arange(end)
        for k, answer in enumerate(row, start=1):
            at = slice(end, end + len(answer))
            batch["input_ids"][i, at] = [prompt[-1], *answer[:-1]]
            batch["position_ids"][i, at] = len(prompt) - 1 + np.arange(len(answer))
            batch["segments"][i, at], batch["targets"][i, at] = k, answer
            batch["counts"][i, k - 1], end = len(answer), at.stop
    if len(starts):
        batch["position_ids"] += np.asarray(starts)[:, None]
    return {name: torch.from_numpy(values) for name, values in batch.items()}


def row_length(prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> int:
    """Tokens of the row that holds a prompt and its answers."""
    return len(prompt) - 1 + sum(map(len, answers))


def halves(batch: dict) -> list[dict]:
    """A packed batch of two rows or more as two: the first rows and the others; what has no row stands in both."""
    n = len(batch["input_ids"])
    cut = [slice(0, -(-n // 2)), slice(-(-n // 2), n)]
    return [{name: v[rows] if isinstance(v, list) or v.ndim else v for name, v in batch.items()} for rows in cut]


def budget_batches(lengths: Sequence[int], token_budget: int) -> list[np.ndarray]:
    """Positions of the rows of each batch, longest first; a padded batch has at most token_budget tokens.

    Neighbours in length share a batch, so little is padding. A row above the budget is a batch of its own. Of more than
    ROWS rows a batch has a multiple of ROWS; the last one may have fewer (`filled`).
    """
    order, batches, start = np.argsort(-np.asarray(lengths), kind="stable"), [], 0
    while start < len(order):
        fits = max(1, token_budget // max(1, lengths[order[start]]))
        fits -= fits % ROWS if fits > ROWS else 0
        batches.append(order[start:start + fits])
        start += fits
    return batches


def filled(at: np.ndarray) -> np.ndarray:
    """The positions of a batch, the last one again until there is a multiple of ROWS, if there are more than that."""
    return np.pad(at, (0, -len(at) % ROWS if len(at) > ROWS else 0), "edge")


def answer_mask(segments: Tensor, position_ids: Tensor, window: int | None = None,
                heads: Tensor | None = None, longest: int = 0) -> Tensor:
    """Who may look at whom, bool [n, 1, L, H + L]: backwards only, at the prompt and at one's own answer.

    window: how far back, in tokens, for models with sliding-window attention. heads: tokens of the head in
    front of each row [n], padded to H = longest (0: that of the longest); without them H is 0.
    """
    mine, theirs = segments[:, :, None], segments[:, None, :]
    allowed, at = ((theirs == 0) | (theirs == mine)).tril(), position_ids
    if heads is not None:
        before = torch.arange(longest or int(heads.max()), device=segments.device).expand(len(segments), -1)
        seen = (before < heads[:, None])[:, None].expand(-1, segments.shape[1], -1)
        allowed, at = torch.cat([seen, allowed], 2), torch.cat([before, position_ids], 1)
    if window and window < at.shape[1]:
        allowed &= position_ids[:, :, None] - at[:, None, :] < window
    return allowed[:, None]


class Heads(DynamicCache):
    """Keys and values of heads, right-padded, [heads, key heads, H, d] a layer; rows read them and add nothing."""

    lengths: Tensor  # tokens of each head
    rows: Tensor | None = None  # which head stands in front of each row of the batch; None: heads are being read
    longest: int  # tokens of the longest of them, padded

    def behind(self, rows: Tensor, length: int) -> "Heads":
        """This cache, set to a batch: rows [n] says which head stands in front of each row of `length` tokens.

        Heads and row together have a multiple of 2 * WIDTH tokens: over others a softmax in bfloat16 takes twice as long.
        """
        self.rows = rows.to(self.lengths.device)
        longest = -(-int(self.lengths[self.rows].max()) // WIDTH) * WIDTH
        self.longest = longest + -(longest + length) % (2 * WIDTH)  # read_heads keeps that many
        return self

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any,
               **kwargs: Any) -> tuple[Tensor, Tensor]:
        key_states = key_states.to(value_states.dtype)  # as attention would; here it is half as much to copy
        if self.rows is None:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        kept = self.layers[layer_idx]
        return tuple(torch.cat([whole[:, :, :self.longest].index_select(0, self.rows), own], 2)
                     for whole, own in ((kept.keys, key_states), (kept.values, value_states)))


def read_heads(model: torch.nn.Module, heads: Sequence[Sequence[int]]) -> Heads:
    """The cache of some heads, token ids each; rows packed with `starts` stand behind them (Heads.behind)."""
    device = next(model.parameters()).device
    batch = pack([[*head, 0] for head in heads], [[[]]] * len(heads))
    cache = Heads()
    last_hidden(model, {name: values.to(device) for name, values in batch.items()}, cache)
    cache.lengths = torch.tensor([len(head) for head in heads], device=device)
    for layer in cache.layers:
        layer.keys, layer.values = (pad(part, (0, 0, 0, WIDTH)) for part in (layer.keys, layer.values))
    return cache


def answer_logps(model: torch.nn.Module, batch: dict[str, Tensor], cache: Heads | None = None,
                 decoder: Decoder | None = None) -> Tensor:
    """Sum of the log-probabilities of each answer's tokens, nats, float32 [n, K].

    batch: what `pack` returned, and `soft` (see `last_hidden`, also for decoder). Only answers' positions go through the
    model's head, and without gradients so many at a time that memory is bounded for any vocabulary.
    """
    hidden, owner = last_hidden(model, batch, cache, decoder), _owners(batch)
    targets = pad(batch["targets"][batch["targets"] != IGNORE], (0, len(hidden) - len(owner)))
    token_logps = decoder.logps(hidden, targets) if decoder else _token_logps(model, hidden, targets)
    sums = token_logps.new_zeros(batch["counts"].numel()).index_add(0, owner, token_logps[:len(owner)])
    return sums.view(batch["counts"].shape)


def answer_means(model: torch.nn.Module, batch: dict[str, Tensor], cache: Heads | None = None,
                 decoder: Decoder | None = None) -> Tensor:
    """Mean of the last hidden states over each answer [n, K, hidden], from the last token of the prompt on."""
    owner, counts = _owners(batch), batch["counts"]
    hidden = last_hidden(model, batch, cache, decoder)[:len(owner)].float()
    sums = hidden.new_zeros(counts.numel(), hidden.shape[1]).index_add(0, owner, hidden)
    return sums.view(*counts.shape, -1) / counts[:, :, None]


def last_hidden(model: torch.nn.Module, batch: dict[str, Tensor], cache: Heads | None = None,
                decoder: Decoder | None = None) -> Tensor:
    """The decoder's last hidden states at the A tokens of `batch` that have a target, row by row; and some rows more.

    A row whose prompt has the token SOFT finds there, as its embedding, its vector of batch["soft"] [n, hidden].
    cache: the heads that stand in front of the rows. decoder: the model's, as helpers.decoder.of has made it, if it could.
    """
    base, segments, positions = _base(model), batch["segments"], batch["position_ids"]
    heads = () if cache is None or cache.rows is None else (cache.lengths[cache.rows], cache.longest)
    mask = answer_mask(segments, positions, getattr(base.config.get_text_config(), "sliding_window", None), *heads)
    if decoder and mask.shape[2] * mask.shape[3] <= SHORT**2:
        return decoder(batch, mask, cache)
    given = {"input_ids": batch["input_ids"]}
    if "soft" in batch:
        words = base.get_input_embeddings()(batch["input_ids"].clamp(min=0))
        here = (batch["input_ids"] == SOFT)[:, :, None]
        given = {"inputs_embeds": torch.where(here, batch["soft"][:, None].to(words.dtype), words)}
    with _attention(base, mask) as mask:
        states = base.get_decoder()(**given, position_ids=positions, attention_mask=mask, past_key_values=cache,
                                    use_cache=cache is not None).last_hidden_state
    at = (batch["targets"].flatten() != IGNORE).nonzero()[:, 0]
    return states.flatten(0, 1)[pad(at, (0, -len(at) % LINE))]  # of few lengths, as rows are (see pack)


def pair_logps(model: torch.nn.Module, batch: dict[str, Tensor],
               decoder: Decoder | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums of chosen and rejected, nats [n], and their token counts [n], of rows with two answers each."""
    sums, counts = answer_logps(model, batch, decoder=decoder), batch["counts"]
    return sums[:, 0], sums[:, 1], counts[:, 0], counts[:, 1]


def implicit_reward(logps: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    """Reward that a policy implies, up to a term of the prompt alone [n] (DPO, Eq. 5)."""
    return beta * (logps - ref_logps)


def dpo_loss(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor,
             beta: float) -> Tensor:
    """Loss of each pair [n] from sums of log-probabilities [n].

    It pursues WikiPersona's Eq. 1 (prompts without prefix) or Eq. 2 (the prefix stands for the person p), by
    Eq. 7 of Direct Preference Optimization (Rafailov et al., 2023).
    """
    margin = implicit_reward(chosen, ref_chosen, beta) - implicit_reward(rejected, ref_rejected, beta)
    return -logsigmoid(margin)  # DPO Eq. 7; the margin is the difference of two rewards of DPO Eq. 5


def check_model(model: torch.nn.Module) -> None:
    """Raises ValueError for a model whose answers these rows would get wrong."""
    config = model.config.get_text_config()
    if config._attn_implementation != "sdpa":
        raise ValueError(f"attn_implementation is {config._attn_implementation!r}, rows of several answers "
                         "need 'sdpa' (boolean 4-D masks). Load the model with helpers.models.load_policy.")
    found = [name for name in AFTER_HEAD if getattr(config, name, None) not in (None, 1.0)]
    if found or len(set(getattr(config, "layer_types", None) or [0])) > 1:
        what = f"changes logits after the head ({found[0]})" if found else "mixes kinds of attention"
        raise ValueError(f"{config.model_type} {what}; helpers.dpo does not. Choose another policy.path.")


def _base(model: torch.nn.Module) -> torch.nn.Module:
    """The transformer itself, its adapter in place."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _token_logps(model: torch.nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """The log-probabilities, nats [A], of the tokens `targets` [A] after hidden states [A, hidden]."""
    word_head = _base(model).get_output_embeddings()
    few = max(256, LOGITS[targets.device.type] // len(word_head.weight) // 256 * 256)
    few = max(1, len(hidden)) if torch.is_grad_enabled() else few
    return torch.cat([-cross_entropy(word_head(rows).float(), wanted, reduction="none")
                      for rows, wanted in zip(hidden.split(few), targets.split(few), strict=True)])


def _owners(batch: dict[str, Tensor]) -> Tensor:
    """Which of the n * K answers each token with a target belongs to."""
    n, k = batch["counts"].shape
    first = k * torch.arange(n, device=batch["counts"].device)[:, None]
    return (batch["segments"] - 1 + first)[batch["targets"] != IGNORE]


@contextmanager
def _attention(base: torch.nn.Module, mask: Tensor) -> Iterator[Tensor]:
    """The mask for transformers' decoder; and, where it is faster, another attention than torch's fused one.

    In bfloat16 on a CPU the fused one takes six times as long, there and back, as three plain operations.
    """
    half = mask.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    if not (half and mask.shape[2] * mask.shape[3] <= SHORT**2):
        yield mask
        return
    config = base.config.get_text_config()
    before, config._attn_implementation = config._attn_implementation, "plain_rows"
    try:
        yield torch.zeros(mask.shape, dtype=torch.bfloat16).masked_fill(~mask, float("-inf"))
    finally:
        config._attn_implementation = before


def _plain_attention(module, query, key, value, attention_mask, scaling, **_) -> tuple[Tensor, None]:
    """softmax(q k' + mask) v: [n, heads, L, d] to [n, L, heads, d]; grouped keys and values are repeated."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = (query * scaling @ key.transpose(2, 3)).add_(attention_mask)  # the query is smaller than the scores
    weights = torch.softmax(scores, dim=-1)
    return (weights @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("plain_rows", _plain_attention)
