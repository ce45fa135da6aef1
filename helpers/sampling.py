"""Sampling from a policy: a prompt is computed once for all its samples, and rows leave the batch as they end.

`generate` samples as usual. `decode` is the loop under it, for any rule over the next token and for several
prompts that grow by the same tokens, such as a question with a prefix and without:

    decode(model, tokenizer, prompts, choose, n, max_new_tokens, seed, batch)
        prompts[i]                    the branches of text i: one prompt, or two, or more
        choose(logits, draws, rows)   the next token of every row, int64 [r]
            logits  float32 [r, branches, vocabulary], of the next token
            draws   float32 [r, DRAWS] in [0, 1), new in every step, and the row's own
            rows    int64 [r], the texts that are still being written: prompt rows // n, sample rows % n

`sampler(temperature, top_p, combine)` makes such a rule; `dial(strength)` is a combine for two branches.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from helpers import chat, models

Choose = Callable[[Tensor, Tensor, Tensor], Tensor]
DRAWS = 4  # uniform numbers for each token; plain sampling uses the first
LOOK = 4  # steps between two looks at who has ended
ROOM = 32  # tokens by which a store of keys and values grows


def generate(model, tokenizer, prompts: Sequence[str], n: int, temperature: float, top_p: float,
             max_new_tokens: int, seed: int, batch: int, stop: str | None = None,
             dtype: str = "auto") -> list[list[str]]:
    """n sampled continuations of each prompt, without special tokens, cut before `stop`.

    batch: sequences computed at a time. A sample follows from the seed, its prompt and its number (that of the
    prompt's samples, counted on where a prompt occurs again), not from what is computed beside it; the last
    digits of a logit may, in bfloat16 above all. temperature 0 takes the likeliest token. dtype: as policy.dtype.
    """
    alone = [(prompt,) for prompt in prompts]
    return decode(model, tokenizer, alone, sampler(temperature, top_p), n, max_new_tokens, seed, batch, stop, dtype)


@torch.inference_mode()
def decode(model, tokenizer, prompts: Sequence[Sequence[str]], choose: Choose, n: int, max_new_tokens: int,
           seed: int, batch: int, stop: str | None = None, dtype: str = "auto") -> list[list[str]]:
    """n continuations of each prompt by the rule `choose` (see the module); the tokens go to all its branches.

    The draws of a text follow from the seed, its first branch and its number, so a rule that looks at the first
    branch alone writes what `generate` writes. batch: sequences, every branch of a text counts.
    """
    firsts, seen = [branches[0] for branches in prompts], Counter()
    encoded = [tuple(tuple(_encode(tokenizer, text)) for text in branches) for branches in prompts]
    keys = []
    for first in firsts:
        keys += [f"{seed}\0{number}\0{first}" for number in range(seen[first], seen[first] + n)]
        seen[first] += n
    order = sorted(range(len(prompts)), key=lambda i: (max(map(len, encoded[i])), encoded[i]))  # equals side by side
    rows, size = [i * n + j for i in order for j in range(n)], max(1, batch // max(map(len, encoded), default=1))
    texts, (fast, context) = [""] * len(keys), _fast(model, dtype)
    with context:
        for at in (rows[i:i + size] for i in range(0, len(rows), size)):
            draws = np.stack([_draws(keys[row], max_new_tokens) for row in at])
            writing = _Batch(fast, [ids for row in at for ids in encoded[row // n]], len(encoded[0]))
            written = _write(writing, tokenizer, choose, torch.tensor(at), torch.from_numpy(draws), stop)
            for row, text in zip(at, written, strict=True):
                texts[row] = text
    return [texts[i:i + n] for i in range(0, len(texts), n)]


def sampler(temperature: float, top_p: float = 1.0, combine: Callable[[Tensor], Tensor] | None = None) -> Choose:
    """The rule of plain sampling, over combine(logits) [r, vocabulary]; of the first branch if there is none."""
    def choose(logits: Tensor, draws: Tensor, rows: Tensor) -> Tensor:
        scores = combine(logits) if combine else logits[:, 0]
        return pick(probabilities(scores, temperature, top_p), draws[:, 0]) if temperature else scores.argmax(-1)
    return choose


def dial(strength: float) -> Callable[[Tensor], Tensor]:
    """Log-probabilities between two branches: 1 is the first, 0 the second, beyond 1 exaggerates the first."""
    return lambda logits: strength * logits[:, 0] + (1 - strength) * logits[:, 1]


def probabilities(logits: Tensor, temperature: float, top_p: float = 1.0) -> Tensor:
    """Of the next token [r, vocabulary]; tokens beyond the likeliest that hold top_p of the mass have none."""
    probs = torch.softmax(logits / temperature, -1)
    if top_p == 1:
        return probs
    ordered, tokens = torch.sort(probs, dim=-1, descending=True, stable=True)
    ordered[ordered.cumsum(-1) - ordered >= top_p] = 0
    return torch.zeros_like(probs).scatter(-1, tokens, ordered / ordered.sum(-1, keepdim=True))


def pick(probs: Tensor, draws: Tensor) -> Tensor:
    """The token at whose place in the cumulated probabilities [r, vocabulary] a draw [r] falls."""
    cumulated = probs.cumsum(-1)
    return torch.searchsorted(cumulated, (draws * cumulated[:, -1])[:, None], right=True)[:, 0]


class _Batch:
    """Sequences that a model continues side by side: their cache, padding and positions."""

    def __init__(self, model, sequences: Sequence[tuple[int, ...]], branches: int) -> None:
        self.model, self.branches, self.device = model, branches, next(model.parameters()).device
        known = {ids: i for i, ids in enumerate(dict.fromkeys(sequences))}  # each is computed once
        width = max(map(len, known))
        ids = torch.tensor([[0] * (width - len(ids)) + list(ids) for ids in known], device=self.device)
        lengths = torch.tensor([len(ids) for ids in known], device=self.device)
        self.mask = (torch.arange(width, device=self.device) >= width - lengths[:, None]).long()
        self.positions, self.cache = (self.mask.cumsum(-1) - 1).clamp(min=0), _roomy_cache(model)
        logits = self._forward(ids, self.positions)
        of = torch.tensor([known[ids] for ids in sequences], device=self.device)
        self._select(of)
        self.logits = logits[of]

    def step(self, tokens: Tensor) -> None:
        """Feed one token to each text, in all its branches."""
        self.mask = pad(self.mask, (0, 1), value=1)
        self.positions = self.positions[:, -1:] + 1
        self.logits = self._forward(tokens.repeat_interleave(self.branches)[:, None], self.positions)

    def keep(self, texts: Tensor) -> None:
        """Go on with these texts alone."""
        self._select((texts[:, None] * self.branches + torch.arange(self.branches, device=self.device)).flatten())

    def _select(self, sequences: Tensor) -> None:
        self.cache.batch_select_indices(sequences)
        self.mask, self.positions = self.mask[sequences], self.positions[sequences]

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        found = self.model(input_ids=ids, attention_mask=self.mask, position_ids=positions,
                           past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return found.logits[:, -1].float()


class _RoomyLayer(DynamicLayer):
    """Keys and values with room to grow: a step writes one token, and does not copy those that are there."""

    def update(self, key_states: Tensor, value_states: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
            self.stores = [self.keys, self.values]
        both = [self._append(i, old, new)
                for i, (old, new) in enumerate(((self.keys, key_states), (self.values, value_states)))]
        self.keys, self.values = both
        return self.keys, self.values

    def _append(self, i: int, old: Tensor, new: Tensor) -> Tensor:
        begin, end = old.shape[2], old.shape[2] + new.shape[2]
        if self.stores[i].data_ptr() != old.data_ptr() or end > self.stores[i].shape[2]:
            self.stores[i] = new.new_zeros(*new.shape[:2], end + ROOM, new.shape[3])
            self.stores[i][:, :, :begin] = old
        self.stores[i][:, :, begin:end] = new
        return self.stores[i][:, :, :end]


def _roomy_cache(model) -> DynamicCache:
    """What the model's own cache would be; a layer with a sliding window keeps all, and its mask leaves out the rest."""
    cache = DynamicCache(config=model.config)
    cache.layers = [_RoomyLayer() if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) else layer
                    for layer in cache.layers]
    return cache


def _write(batch: _Batch, tokenizer, choose: Choose, rows: Tensor, draws: Tensor, stop: str | None) -> list[str]:
    """The texts of one batch. draws: [r, new tokens, DRAWS]."""
    rows, draws, ends = rows.to(batch.device), draws.to(batch.device), _ends(batch.model, tokenizer).to(batch.device)
    live = torch.arange(len(rows), device=batch.device)
    tokens = torch.full(draws.shape[:2], int(ends[0]), device=batch.device)
    for t in range(draws.shape[1]):
        if t:
            if t % LOOK == 0:
                still = torch.nonzero(~_ended(tokens[live, :t], ends, tokenizer, stop))[:, 0]
                if not len(still):
                    break
                if 8 * len(still) <= 7 * len(live):
                    live = live[still]
                    batch.keep(still)
            batch.step(tokens[live, t - 1])
        logits = batch.logits.view(len(live), batch.branches, -1)
        tokens[live, t] = choose(logits, draws[live, t], rows[live])
    kept = [ids[:ended] for ids, ended in zip(tokens.tolist(), _lengths(tokens, ends), strict=True)]
    texts = tokenizer.batch_decode(kept, skip_special_tokens=True)
    return [text.split(stop)[0] for text in texts] if stop else texts


def _ends(model, tokenizer) -> Tensor:
    """The tokens that end a text: the tokenizer's, its chat template's, and what else the model's generation settings name."""
    named = model.generation_config.eos_token_id
    named = named if isinstance(named, list) else [named]
    return torch.tensor([i for i in dict.fromkeys([*chat.stop_ids(tokenizer), *named]) if i is not None])


def _ended(tokens: Tensor, ends: Tensor, tokenizer, stop: str | None) -> Tensor:
    over = torch.isin(tokens, ends).any(-1)
    if stop:
        said = [stop in text for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]
        over |= torch.tensor(said, device=over.device)
    return over


def _lengths(tokens: Tensor, ends: Tensor) -> list[int]:
    """Tokens of each row before the first that ends it."""
    over = torch.isin(tokens, ends)
    return torch.where(over.any(-1), over.int().argmax(-1), tokens.shape[1]).tolist()


def _encode(tokenizer, text: str) -> list[int]:
    begin = tokenizer.bos_token or ""
    whole = text if begin and text.startswith(begin) else chat.as_prompt(tokenizer, text)
    return tokenizer(whole, add_special_tokens=False)["input_ids"]


def _draws(key: str, length: int) -> np.ndarray:
    """Uniform numbers in [0, 1) that follow from the key alone, float32 [length, DRAWS]."""
    digest = hashlib.sha256(key.encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "big"))).random(
        (length, DRAWS), dtype=np.float32)


def _fast(model, dtype: str) -> tuple[torch.nn.Module, AbstractContextManager]:
    """The model to sample from and the context to do it in.

    Autocast on a CPU rounds all weights again for every token. There a copy is sampled from, in bfloat16 and with
    its adapter merged into the base; a quantised base stays as it is.
    """
    context, weights = models.autocast(model, dtype), next(model.parameters())
    if isinstance(context, nullcontext) or weights.device.type != "cpu" or getattr(model, "is_quantized", False):
        return model, context
    light = models.merged_copy(model)
    for parameter in light.parameters():  # not `to`: the rotary frequencies are a buffer and need their digits
        parameter.data = parameter.data.to(torch.bfloat16)
    config = light.config.get_text_config()
    if config._attn_implementation == "sdpa":
        config._attn_implementation = "one_query"
    return light, nullcontext()


def _one_query(module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float,
               **kwargs) -> tuple[Tensor, None]:
    """Attention of one new token [n, heads, 1, d]: two plain products, a third of what the fused one takes in bfloat16.

    Heads that share keys and values are the columns of one product. Several tokens are left to the fused one.
    """
    if query.shape[2] > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    (n, heads, _, d), (key, length), (value, _) = query.shape, _with_room(key), _with_room(value)
    scores = (key @ query.view(n, key.shape[1], -1, d).transpose(2, 3)).transpose(2, 3)[..., :length].float() * scaling
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, float("-inf"))
    found = pad(torch.softmax(scores, -1).to(value.dtype), (0, value.shape[2] - length)) @ value
    return found.view(n, 1, heads, d), None


def _with_room(part: Tensor) -> tuple[Tensor, int]:
    """The store [n, heads, room, d] that begins with `part`, and the length of that; a product would copy a piece."""
    (n, heads, length, d), strides = part.shape, part.stride()
    if strides[2:] != (d, 1) or strides[1] < length * d:  # no piece of a store
        return part, length
    return part.as_strided((n, heads, strides[1] // d, d), strides), length


AttentionInterface.register("one_query", _one_query)
AttentionMaskInterface.register("one_query", sdpa_mask)
