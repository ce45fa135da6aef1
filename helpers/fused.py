"""A policy with an adapter in fewer and larger operations, forwards and back; the base is frozen.

What a small model does is thousands of small operations, and what they cost is mostly not arithmetic. Layers
that read the same input are multiplied in one go with their adapters, and a norm is one step. Numbers and
gradients are those of peft and transformers, and what is not known to be replaceable is left to them.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:  # seconds that whoever only scores the base does not need
    from peft.tuners.lora.layer import Linear

READ_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # where a model has them


@contextmanager
def layers(model: nn.Module, adapter: bool = True) -> Iterator[int]:
    """Within the block the adapter's layers, the norms and rotations of `model` are fused; yields how many layers are.

    Left alone are quantised layers, layers with several adapters, DoRA or dropout, and other norms. adapter: False
    fuses the norms alone, where an adapter is merged or batches mix several, and where other threads are at work too:
    a rotation is fused for all models of its kind.
    """
    found = [*(_adapted(model) if adapter else ()), *_norms(model)]
    rotating = _rotating(model) if adapter else {}
    for module, forward in found:
        module.forward = forward
    for module in rotating:
        module.apply_rotary_pos_emb = rotate
    try:
        yield len(found)
    finally:
        for module, _ in found:
            del module.forward
        for module, plain in rotating.items():
            module.apply_rotary_pos_emb = plain


class Together:
    """LoRA layers that read the same input: the first that is called computes for all of them.

    The frozen weights [out, in] are kept in the precision in which they are multiplied, if it is not their own.
    """

    def __init__(self, members: Sequence["Linear"]) -> None:
        self.members, self.weights = members, {}
        self.read: Tensor | None = None
        self.waiting: list[Tensor | None] = []

    def forward(self, i: int, x: Tensor) -> Tensor:
        """Output of the i-th layer [..., out] for x [..., in]."""
        if self.read is not x or self.waiting[i] is None:
            self.read, self.waiting = x, list(self._compute(x))
        mine, self.waiting[i] = self.waiting[i], None
        if not any(one is not None for one in self.waiting):
            self.read = None
        return mine

    def _compute(self, x: Tensor) -> tuple[Tensor, ...]:
        dtype, names = compute_dtype(x), [one.active_adapters[0] for one in self.members]
        if dtype not in self.weights:
            self.weights[dtype] = [one.base_layer.weight.detach().to(dtype) for one in self.members]
        down = [one.lora_A[name].weight for one, name in zip(self.members, names, strict=True)]
        up = [one.lora_B[name].weight for one, name in zip(self.members, names, strict=True)]
        scales = [one.scaling[name] for one, name in zip(self.members, names, strict=True)]
        with torch.autocast(x.device.type, enabled=False):
            outputs = _Lora.apply(x, self.weights[dtype], scales, *down, *up)
        biases = [one.base_layer.bias for one in self.members]
        return tuple(y if b is None else y + b.to(dtype) for y, b in zip(outputs, biases, strict=True))


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Queries and keys [n, heads, L, d] turned by their positions; cos, sin [n, L, d]. transformers' function."""
    half = cos.shape[-1] // 2
    cos, sin = (x.unsqueeze(unsqueeze_dim) for x in (cos, torch.cat((-sin[..., :half], sin[..., half:]), -1)))
    return _Rotate.apply(q, cos, sin), _Rotate.apply(k, cos, sin)


def compute_dtype(x: Tensor) -> torch.dtype:
    """What autocast would multiply x in, or its own type."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class _Lora(torch.autograd.Function):
    """y_i = x W_i' + s_i (x A_i') B_i' for layers that share x [..., in]; gradients of x, A_i and B_i."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Sequence[Tensor], scales: Sequence[float], *low: Tensor) -> tuple[Tensor, ...]:
        n, dtype, rows = len(scales), weights[0].dtype, x.flatten(0, -2).to(weights[0].dtype)
        down = torch.cat(low[:n]).to(dtype)  # [sum of r, in]
        up = [(b * s).to(dtype) for b, s in zip(low[n:], scales, strict=True)]  # [out, r] each
        inner = rows @ down.t()
        ctx.scales, ctx.shape, ctx.ranks = scales, x.shape, [b.shape[1] for b in up]
        ctx.save_for_backward(rows, down, inner, *weights, *up)
        parts = zip(weights, inner.split(ctx.ranks, 1), up, strict=True)
        return tuple((rows @ w.t()).addmm_(u, b.t()).view(*x.shape[:-1], -1) for w, u, b in parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (rows, down, inner, *frozen), n = ctx.saved_tensors, len(grads)
        weights, up, grads = frozen[:n], frozen[n:], [g.flatten(0, -2) for g in grads]
        back = torch.cat([g @ b for g, b in zip(grads, up, strict=True)], 1)
        d_up = [(g.t() @ u).float() * s
                for g, u, s in zip(grads, inner.split(ctx.ranks, 1), ctx.scales, strict=True)]
        d_down = (back.t() @ rows).float().split(ctx.ranks)
        d_rows = back @ down if ctx.needs_input_grad[0] else None
        for g, w in zip(grads, weights, strict=True) if d_rows is not None else ():
            d_rows.addmm_(g, w)
        return None if d_rows is None else d_rows.view(ctx.shape), None, None, *d_down, *d_up


class _Norm(torch.autograd.Function):
    """x / rms(x) times a frozen weight, over the last dimension, in float32; the result in `dtype`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        normed, pull = x.float() * scale, grad.float() * weight
        along = (pull * normed).mean(-1, keepdim=True)
        return pull.addcmul_(normed, along, value=-1).mul_(scale).to(x.dtype), None, None, None


class _Rotate(torch.autograd.Function):
    """x cos + (x with its halves swapped) sin, in the precision of cos; the result in that of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, sin.roll(sin.shape[-1] // 2, -1)), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.to(cos.dtype, memory_format=torch.contiguous_format)
    return (wide * cos).addcmul_(wide.roll(wide.shape[-1] // 2, -1), sin).to(x.dtype)


def _adapted(model: nn.Module) -> Iterator[tuple[nn.Module, Callable]]:
    """Each LoRA layer that can be fused, with its new forward."""
    for parent in model.modules():
        children = {name: child for name, child in parent.named_children() if _plain_lora(child)}
        groups = [names for names in READ_TOGETHER if all(name in children for name in names)]
        alone = [(name,) for name in children if not any(name in names for names in groups)]
        for names in (*groups, *alone):
            together = Together([children[name] for name in names])
            for i, name in enumerate(names):
                yield children[name], _bind(together, i)


def _bind(together: Together, i: int) -> Callable[..., Tensor]:
    return lambda x: together.forward(i, x)


def _plain_lora(module: nn.Module) -> bool:
    from peft.tuners.lora.layer import Linear

    if type(module) is not Linear or type(module.base_layer) is not nn.Linear or len(module.active_adapters) != 1:
        return False
    name, dropout = module.active_adapters[0], module.lora_dropout
    return (name in module.lora_A and name not in module.lora_variant and not module.merged
            and not module.disable_adapters and not module.fan_in_fan_out and not module.lora_bias[name]
            and getattr(dropout[name], "p", 0.0) == 0.0 and not module.base_layer.weight.requires_grad)


def _norms(model: nn.Module) -> Iterator[tuple[nn.Module, Callable]]:
    """Each norm that is x / rms(x) times a frozen weight, which is tried out, with its new forward."""
    for module in model.modules():
        weight, epsilon = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
        if epsilon is None or weight is None or weight.ndim != 1 or weight.requires_grad:
            continue
        x = torch.linspace(-2, 3, len(weight), device=weight.device)
        if torch.allclose(module(x), _Norm.apply(x, weight, epsilon, x.dtype), rtol=1e-5):
            yield module, _norm(weight, epsilon)


def _norm(weight: Tensor, epsilon: float) -> Callable[[Tensor], Tensor]:
    return lambda x: _Norm.apply(x, weight, epsilon, compute_dtype(x))


def _rotating(model: nn.Module) -> dict[ModuleType, Callable]:
    """The Python modules from which the layers take a rotation that is ours, which is tried out; and theirs."""
    sources = {sys.modules[type(module).__module__] for module in model.modules()}
    theirs = {source: source.apply_rotary_pos_emb for source in sources if hasattr(source, "apply_rotary_pos_emb")
              and list(signature(source.apply_rotary_pos_emb).parameters)[:4] == ["q", "k", "cos", "sin"]}
    x = torch.linspace(-2, 3, 24).view(1, 2, 3, 4)
    cos, sin = x[:, 0], x[:, 1].roll(1)
    return {source: function for source, function in theirs.items()
            if torch.allclose(function(x, x, cos, sin)[0], rotate(x, x, cos, sin)[0], rtol=1e-5)}
