"""The last layer of a decoder at the answers alone: of what stands before them it computes keys and values, and no more.

Nothing reads the last hidden states of a prompt. In a model of few layers that is a good part of the work.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj"}
KNOWN: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # layers that were tried out


@contextmanager
def from_position(decoder: nn.Module, start: int, rows: int) -> Iterator[int]:
    """Within the block the hidden states of `decoder`, of batches of `rows`, begin at a position: yielded, `start` or 0.

    It is 0, and nothing is changed, where the last layer is not built as Llama's (which is tried out), recomputes its
    activations on the way back, after the block, or has been given another forward by somebody else.
    """
    layer = getattr(decoder, "layers", [None])[-1]
    recomputes = getattr(layer, "gradient_checkpointing", False) and decoder.training
    if not start or recomputes or "forward" in vars(layer or object) or not _as_in_llama(layer, rows):
        yield 0
        return
    layer.forward = _forward(layer, start)
    try:
        yield start
    finally:
        del layer.forward


def _forward(layer: nn.Module, start: int) -> Callable[..., Tensor]:
    """layer.forward for the positions from `start` on: [n, L, hidden] to [n, L - start, hidden]."""
    attention = layer.self_attn

    def forward(hidden: Tensor, attention_mask: Tensor, position_embeddings: tuple[Tensor, Tensor],
                past_key_values=None, **kwargs) -> Tensor:
        (n, length, _), x = hidden.shape, layer.input_layernorm(hidden)
        q, k, v = (project(x).view(n, length, -1, attention.head_dim).transpose(1, 2)
                   for project in (attention.q_proj, attention.k_proj, attention.v_proj))
        q, k = sys.modules[type(attention).__module__].apply_rotary_pos_emb(q, k, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, attention.layer_idx)
        hidden = hidden[:, start:]
        if start == length:
            return hidden
        attend = ALL_ATTENTION_FUNCTIONS[attention.config._attn_implementation]
        found, _ = attend(attention, q[:, :, start:], k, v, attention_mask[:, :, start:], scaling=attention.scaling,
                          dropout=0.0, **kwargs)
        hidden = hidden + attention.o_proj(found.reshape(n, length - start, -1))
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))

    return forward


def _as_in_llama(layer: nn.Module | None, rows: int) -> bool:
    if layer is not None and layer not in KNOWN:
        KNOWN[layer] = _is_built_so(layer) and _gives_the_same(layer, rows)
    return layer is not None and KNOWN[layer]


def _is_built_so(layer: nn.Module) -> bool:
    children = dict(layer.named_children())
    return (set(children) == PARTS and {name for name, _ in children["self_attn"].named_children()} == PROJECTIONS
            and hasattr(sys.modules[type(layer.self_attn).__module__], "apply_rotary_pos_emb"))


@torch.no_grad()
def _gives_the_same(layer: nn.Module, rows: int) -> bool:
    """Whether both ways agree on three made-up tokens, of which the last two are wanted; each row may have its own adapter."""
    attention, norm = layer.self_attn, layer.input_layernorm.weight
    hidden = torch.linspace(-2, 3, 3 * len(norm), device=norm.device, dtype=norm.dtype).view(1, 3, -1).expand(rows, -1, -1)
    angles = torch.linspace(0, 1, 3 * attention.head_dim, device=norm.device, dtype=norm.dtype).view(1, 3, -1)
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool, device=norm.device).tril()
    given = {"attention_mask": mask, "position_embeddings": (angles.cos(), angles.sin())}
    with torch.autocast(norm.device.type, enabled=False):
        whole, part = type(layer).forward(layer, hidden, **given)[:, 1:], _forward(layer, 1)(hidden, **given)
    return bool((whole - part).norm() <= 1e-2 * whole.norm())
