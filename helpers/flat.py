"""Packed rows through a decoder without what no answer needs: padding, and in the last layer the prompts.

For norms and projections a batch is a list of tokens; only attention sees rows. In the last layer a token that
predicts none of an answer's has keys and values, and nothing else. The numbers are those of the whole.
"""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

KINDS = ("llama", "mistral", "qwen2", "qwen3")  # whose layers transformers 5.23 computes as `_layer` does
MULTIPLE, WIDTH = 64, 8  # lists and rows are as long as a multiple of these: few shapes, for each costs a new kernel


class Places(NamedTuple):
    """Some tokens of rows [n, L] as a list, filled up to a multiple; the last one at least is fill.

    Nobody reads what becomes of fill, so it gets no gradient, nor does anything through it.
    """

    tokens: Tensor  # where each stands among the n * L [T]; fill: 0
    slots: Tensor  # the tokens of each row, as places in the list [n, W]; T - 1 where a row has fewer
    homes: Tensor  # where each stands among the n * W [T]; fill: 0
    count: int  # of those that are no fill

    def rows(self, x: Tensor) -> Tensor:
        """The list [T, heads, d] as rows [n, heads, W, d]."""
        return _Move.apply(x, self.slots.flatten(), self.homes, self.count).unflatten(0, self.slots.shape).transpose(1, 2)

    def listed(self, x: Tensor) -> Tensor:
        """Rows [n, W, heads, d] as the list [T, heads * d]."""
        return _Move.apply(x.flatten(0, 1).flatten(1), self.homes, self.slots.flatten(), self.slots.numel())


def known(decoder: nn.Module) -> bool:
    """Whether `read` computes what this decoder would: a kind it knows, and nothing patched or hooked."""
    if decoder.config.model_type not in KINDS:
        return False
    layer = decoder.layers[0]
    return not (any("forward" in vars(module) for module in (decoder, layer, layer.self_attn, layer.mlp))
                or any(module._forward_pre_hooks or module._forward_hooks for module in layer.modules()))


def places(chosen: Tensor, width: int = 0) -> Places:
    """The chosen tokens, bool [n, L], row by row; width: W, if it is given."""
    tokens, rank = chosen.flatten().nonzero()[:, 0], chosen.cumsum(1) - 1
    width, device = width or (int(rank.max()) // WIDTH + 1) * WIDTH, chosen.device
    homes = (rank + width * torch.arange(len(chosen), device=device)[:, None]).flatten()[tokens]
    fill = MULTIPLE - len(tokens) % MULTIPLE
    slots = torch.full((len(chosen) * width,), len(tokens) + fill - 1, device=device)
    slots[homes] = torch.arange(len(tokens), device=device)
    return Places(pad(tokens, (0, fill)), slots.view(-1, width), pad(homes, (0, fill)), len(tokens))


def read(decoder: nn.Module, embedded: Tensor, positions: Tensor, segments: Tensor, wanted: Tensor, mask: Tensor,
         attention: Callable[..., tuple[Tensor, None]], cache: Any = None) -> Tensor:
    """Last hidden states of the wanted tokens, row by row, and of some fill [m, hidden].

    embedded: the tokens' embeddings [n, L, hidden]; positions, segments as from dpo.pack; wanted: bool [n, L].
    mask [n, 1 or heads, L, H + L] and attention as transformers passes them; cache: keys and values of H tokens in
    front of each row.
    """
    width = segments.shape[1]
    real, asked = places(segments >= 0, width), places(wanted)
    x = embedded.flatten(0, 1).index_select(0, real.tokens)
    turn = decoder.rotary_emb(x[None], position_ids=positions.flatten()[real.tokens][None])
    for layer in decoder.layers[:-1]:
        x = _run(layer, x, turn, mask, real, real, None, attention, cache)
    seen = (asked.tokens % width)[asked.slots][:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3])
    keep = real.slots.flatten()[asked.tokens]
    x = _run(decoder.layers[-1], x, turn, mask.gather(2, seen), real, asked, keep, attention, cache)
    return decoder.norm(x)


def _run(layer: nn.Module, x: Tensor, *args: Any) -> Tensor:
    """`_layer`, its activations recomputed on the way back if the model is set so."""
    if layer.gradient_checkpointing and layer.training:
        return layer._gradient_checkpointing_func(_layer, layer, x, *args)
    return _layer(layer, x, *args)


def _layer(layer: nn.Module, x: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor, keys: Places, queries: Places,
           keep: Tensor | None, attention: Callable, cache: Any) -> Tensor:
    """One layer for a list of tokens [T, hidden]; with `keep` [m] what becomes of these alone."""
    own, normed = layer.self_attn, layer.input_layernorm(x)
    q, k, v = (project(normed).unflatten(1, (-1, own.head_dim)) for project in (own.q_proj, own.k_proj, own.v_proj))
    if hasattr(own, "q_norm"):
        q, k = own.q_norm(q), own.k_norm(k)
    q, k = (rotated[0] for rotated in sys.modules[type(layer).__module__].apply_rotary_pos_emb(
        q[None], k[None], *turn, unsqueeze_dim=2))
    if keep is not None:
        q, x = q.index_select(0, keep), x.index_select(0, keep)
    q, k, v = queries.rows(q), keys.rows(k), keys.rows(v)
    if cache is not None:
        k, v = cache.update(k, v, own.layer_idx)
    x = x + own.o_proj(queries.listed(attention(own, q, k, v, mask, scaling=own.scaling)[0]))
    return x + layer.mlp(layer.post_attention_layernorm(x))


class _Move(torch.autograd.Function):
    """x[there]. back: where each of x has gone; those from `count` on went nowhere and get no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Tensor, back: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(back)
        ctx.count = count
        return x.index_select(0, there)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        found = grad.index_select(0, *ctx.saved_tensors)
        found[ctx.count:] = 0
        return found, None, None, None
