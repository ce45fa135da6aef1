"""The decoder of a Llama, there and back, in few and large operations; the base is frozen, an adapter may be trained.

What a small model does is thousands of small operations, and what they cost is mostly not arithmetic. Here a layer is two
steps of autograd with ways back of their own: layers that read the same input are one product with their adapters, every
token of a batch is computed once (helpers.line), and in the last layer answers alone ask. Numbers and gradients are those
of transformers and peft, up to rounding. On a CPU; other devices, and models built otherwise, are left to them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from helpers.line import IGNORE, SOFT, Line, Rows

PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
FEW_LOGITS = 2**19  # at a time: what stays near the processor is quicker


class Decoder:
    """decoder(batch, mask) gives the last hidden states of the answers' tokens; of a model that `of` knows."""

    def __init__(self, model: nn.Module) -> None:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.whole, self.words = base.get_decoder(), base.get_output_embeddings()
        self.layers = [_Parts(layer, self.whole.config) for layer in self.whole.layers]
        self.low = [weight for parts in self.layers for weight in parts.low]
        self.dtype: torch.dtype | None = None  # of what the layers hold

    def __call__(self, batch: dict[str, Tensor], mask: Tensor, past: Any = None) -> Tensor:
        """The last hidden states [A, hidden] at the tokens of `batch` that have a target, row by row, and some more.

        batch: as from dpo.pack, and `soft` (dpo.last_hidden). mask: who may look at whom, bool [n, 1, L, H + L]. past: the
        heads in front of the rows (dpo.Heads), H tokens each; without gradients.
        """
        line = Line(batch, None if past is None else past.rows)
        x = self._read(batch, line.tokens)
        device, dtype = x.device, _compute_dtype(x)
        cos, sin = (part[0, :, None].float() for part in
                    self.whole.rotary_emb(x, batch["position_ids"].flatten()[line.tokens][None]))
        sin = torch.cat([-sin[..., :sin.shape[-1] // 2], sin[..., sin.shape[-1] // 2:]], -1)
        row = torch.arange(len(mask), device=device)[:, None]
        everywhere, ends = (_Where(line.rows, asks, torch.zeros(some.shape, dtype=dtype, device=device)
                                   .masked_fill(~some, float("-inf")), cos, sin, line, past)
                            for asks, some in ((line.rows, mask[:, 0]), (line.ends, mask[row, 0, line.places])))
        self._take_over(dtype)
        with torch.autocast(device.type, enabled=False):
            for number, parts in enumerate(self.layers, start=1):
                where = ends if number == len(self.layers) else everywhere
                x = _Attention.apply(x, parts, where, *parts.qkv.low, *parts.o.low)
                x = _FeedForward.apply(x, parts, dtype, *parts.gate_up.low, *parts.down.low)
            return _Norm.apply(x, self.whole.norm.weight, self.whole.norm.variance_epsilon, dtype)

    def logps(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """The log-probabilities, nats [A], of the tokens `targets` [A] after hidden states [A, hidden]."""
        return _LogProbs.apply(hidden, self.words.weight.detach().to(hidden.dtype), targets)

    @torch.no_grad()
    def _take_over(self, dtype: torch.dtype) -> None:
        """The adapter's weights of now; their versions would not tell, for a fused optimizer leaves those as they are."""
        if self.dtype != dtype:
            self.there = [view for parts in self.layers for group in parts.groups for view in group.lay_out(dtype)]
        self.dtype = dtype
        if self.low:
            torch._foreach_copy_(self.there, self.low)

    def _read(self, batch: dict[str, Tensor], tokens: Tensor) -> Tensor:
        """The embeddings [T, hidden] of the tokens in the line."""
        ids = batch["input_ids"].flatten()[tokens]
        words = self.whole.get_input_embeddings()(ids.clamp(min=0))
        if "soft" not in batch:
            return words
        soft = batch["soft"][tokens // batch["input_ids"].shape[1]].to(words.dtype)
        return torch.where((ids == SOFT)[:, None], soft, words)


def of(model: nn.Module) -> Decoder | None:
    """The decoder of a model, with its adapter if it has one, where this module knows how; it is tried out. Else None."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    whole, words = base.get_decoder(), base.get_output_embeddings()
    layers, trained = getattr(whole, "layers", ()), [name for name, p in base.named_parameters() if p.requires_grad]
    frozen = not torch.is_grad_enabled() or all("lora_" in name for name in trained)
    known = (frozen and type(words) is nn.Linear and words.bias is None and next(base.parameters()).device.type == "cpu"
             and "forward" not in vars(whole) and len(layers) and all(map(_is_llamas, layers)))
    return made if known and _gives_the_same(made := Decoder(model)) else None


def _compute_dtype(x: Tensor) -> torch.dtype:
    """What autocast would multiply x in, or its own type."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class _Linear(NamedTuple):
    """A frozen layer, and its adapter if it has one: y = x W' + scale (x A') B' + b."""

    weight: Tensor
    bias: Tensor | None
    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 1.0


class _Joint:
    """Linear layers that read the same input, with their adapters.

    both [O + R, in]: all W, then all A; up [O, R]: each B in a corner of its own, so that one product does for all.
    """

    def __init__(self, members: Sequence[_Linear]) -> None:
        self.members, self.scale = members, members[0].scale
        downs = [one.a for one in members if one.a is not None]
        self.low = [*downs, *(one.b for one in members if one.b is not None)]
        self.ranks, self.out = [len(a) for a in downs], [len(one.weight) for one in members]
        self.width = sum(self.out)

    def lay_out(self, dtype: torch.dtype) -> list[Tensor]:
        """Take the frozen weights in `dtype`; the places in which the adapters' belong."""
        biases = [one.bias for one in self.members if one.bias is not None]
        self.both = torch.cat([*(one.weight for one in self.members), *self.low[:len(self.ranks)]]).detach().to(dtype)
        self.up = self.both.new_zeros(self.width, sum(self.ranks))
        self.bias = torch.cat(biases).detach().to(dtype) if biases else None
        corners = [row.split(self.ranks, 1)[i] for i, row in enumerate(self.up.split(self.out))] if self.ranks else []
        return [*self.both[self.width:].split(self.ranks), *corners]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the layers give, side by side [n, O], and what stands between the low ranks [n, R]."""
        found = x @ self.both.t()
        y, low = found[:, :self.width], found[:, self.width:]
        if self.ranks:
            low = low * self.scale
            y.addmm_(low, self.up.t())
        return (y if self.bias is None else y.add_(self.bias)), low

    def room(self, grad: Tensor | int) -> Tensor:
        """A gradient [n, O], or room for one of n rows, as `backward` wants it: [n, O + R]."""
        if isinstance(grad, int):
            return self.both.new_empty(grad, len(self.both))
        room = self.room(len(grad))
        room[:, :self.width] = grad
        return room

    def backward(self, grad: Tensor, x: Tensor, low: Tensor, wanted: bool = True) -> tuple[Tensor | None, list[Tensor]]:
        """The gradients of x, if wanted, and of all A, then all B; grad as from `room`, of which R columns are overwritten."""
        if not self.ranks:
            return grad @ self.both if wanted else None, []
        given, lower = grad[:, :self.width], grad[:, self.width:]
        lower.copy_(given @ self.up * self.scale)
        down, up = (lower.t() @ x).float().split(self.ranks), (low.t() @ given).float().split(self.ranks)
        ups = [part.split(self.out, 1)[i].t() for i, part in enumerate(up)]
        return grad @ self.both if wanted else None, [*down, *ups]


class _Parts:
    """The weights of a layer."""

    def __init__(self, layer: nn.Module, config: Any) -> None:
        own = dict(layer.self_attn.named_children()) | dict(layer.mlp.named_children())
        self.groups = [_Joint([_linear(own[name]) for name in names]) for names in TOGETHER]
        self.qkv, self.o, self.gate_up, self.down = self.groups
        self.norms = [(norm.weight.detach(), norm.variance_epsilon)
                      for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
        self.heads, self.keys, self.d = config.num_attention_heads, config.num_key_value_heads, layer.self_attn.head_dim
        self.scaling, self.number = layer.self_attn.scaling, layer.self_attn.layer_idx
        self.low = [weight for group in self.groups for weight in group.low]


@dataclass(frozen=True)
class _Where:
    """Who asks whom: rows of keys and of queries, what is added to their scores [n, Lq, H + L], and angles [T, 1, d]."""

    keys: Rows
    queries: Rows
    mask: Tensor
    cos: Tensor
    sin: Tensor
    line: Line
    past: Any

    @property
    def answers(self) -> Tensor | None:
        """The tokens that ask, if not all do."""
        return self.line.answers if self.queries is self.line.ends else None


class _Attention(torch.autograd.Function):
    """x plus what it attends to: x [T, hidden] to [T, hidden], or to [A, hidden] where answers alone ask."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: _Parts, where: _Where, *low: Tensor) -> Tensor:
        (n, asked, _), d, heads, keys = where.mask.shape, parts.d, parts.heads, parts.keys
        normed, scale = _normed(x, *parts.norms[0], where.mask.dtype)
        qkv, low_qkv = parts.qkv.forward(normed)
        q, k, v = qkv.unflatten(1, (-1, d)).split([heads, keys, keys], 1)
        cos, sin, rest = where.cos, where.sin, x
        if where.answers is not None:
            q, cos, sin, rest = (part.index_select(0, where.answers) for part in (q, cos, sin, x))
        known = torch.cat([_turned(k, where.cos, where.sin), v], 1).view(-1, d)
        key, value = where.keys.spread(2 * keys, 2).take(known).view(2, n * keys, -1, d)
        if where.past is not None:
            key, value = (part.flatten(0, 1) for part in where.past.update(
                key.unflatten(0, (n, keys)), value.unflatten(0, (n, keys)), parts.number))
        turned = _turned(q, cos * parts.scaling, sin * parts.scaling).view(-1, d)
        query = where.queries.spread(heads).take(turned).view(n * keys, -1, d)
        scores = torch.bmm(query, key.transpose(1, 2))
        scores.view(n, heads, asked, -1).add_(where.mask[:, None])
        weights = torch.softmax(scores, -1)
        found = where.queries.collect(heads).take(torch.bmm(weights, value).view(-1, d)).view(len(q), -1)
        o, low_o = parts.o.forward(found)
        ctx.parts, ctx.where = parts, where
        ctx.save_for_backward(x, normed, scale, low_qkv, query, key, value, weights, found, low_o)
        return rest + o

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, normed, scale, low_qkv, query, key, value, weights, found, low_o = ctx.saved_tensors
        parts, where, d, heads, keys = ctx.parts, ctx.where, ctx.parts.d, ctx.parts.heads, ctx.parts.keys
        d_found, g_o = parts.o.backward(parts.o.room(grad), found, low_o)
        given = where.queries.collect(heads).give(d_found.view(-1, d)).view(query.shape)
        d_known = key.new_empty(2, *key.shape)
        torch.bmm(weights.transpose(1, 2), given, out=d_known[1])
        d_scores = torch._softmax_backward_data(torch.bmm(given, value.transpose(1, 2)), weights, -1, weights.dtype)
        torch.bmm(d_scores.transpose(1, 2), query, out=d_known[0])
        d_q = where.queries.spread(heads).give(torch.bmm(d_scores, key).view(-1, d)).view(len(grad), heads, d)
        d_k, d_v = where.keys.spread(2 * keys, 2).give(d_known.view(-1, d)).view(len(x), -1, d).chunk(2, 1)
        room = parts.qkv.room(len(x))
        at_q, at_k, at_v = room[:, :parts.qkv.width].unflatten(1, (-1, d)).split([heads, keys, keys], 1)
        cos, sin = where.cos, where.sin.roll(d // 2, -1)  # turned back
        at_k.copy_(_turned(d_k, cos, sin))
        at_v.copy_(d_v)
        if where.answers is None:
            at_q.copy_(_turned(d_q, cos * parts.scaling, sin * parts.scaling))
        else:
            real = where.answers[:where.line.wanted]
            cos, sin = cos.index_select(0, real) * parts.scaling, sin.index_select(0, real) * parts.scaling
            at_q.zero_().index_copy_(0, real, _turned(d_q[:len(real)], cos, sin))
        d_normed, g_qkv = parts.qkv.backward(room, normed, low_qkv, ctx.needs_input_grad[0])
        if d_normed is None:
            return None, None, None, *g_qkv, *g_o
        d_x = _norm_back(d_normed, x, parts.norms[0][0], scale)
        d_x = d_x.add_(grad) if where.answers is None else d_x.index_add_(0, where.answers, grad)
        return d_x, None, None, *g_qkv, *g_o


class _FeedForward(torch.autograd.Function):
    """x plus what the gated layers make of it: [T, hidden] to [T, hidden]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: _Parts, dtype: torch.dtype, *low: Tensor) -> Tensor:
        normed, scale = _normed(x, *parts.norms[1], dtype)
        both, low_both = parts.gate_up.forward(normed)
        gate, up = both.chunk(2, 1)
        opened = silu(gate)
        through = opened * up
        down, low_down = parts.down.forward(through)
        ctx.parts = parts
        ctx.save_for_backward(x, normed, scale, both, low_both, opened, through, low_down)
        return x + down

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, normed, scale, both, low_both, opened, through, low_down), parts = ctx.saved_tensors, ctx.parts
        d_through, g_down = parts.down.backward(parts.down.room(grad), through, low_down)
        gate, up = both.chunk(2, 1)
        room = parts.gate_up.room(len(x))
        d_gate, d_up = room[:, :parts.gate_up.width].chunk(2, 1)
        torch.mul(d_through, opened, out=d_up)
        torch.ops.aten.silu_backward.grad_input(d_through.mul_(up), gate, grad_input=d_gate)
        d_normed, g_both = parts.gate_up.backward(room, normed, low_both)
        return _norm_back(d_normed, x, parts.norms[1][0], scale).add_(grad), None, None, *g_both, *g_down


class _Norm(torch.autograd.Function):
    """x / rms(x) times a frozen weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
        found, scale = _normed(x, weight, epsilon, dtype)
        ctx.save_for_backward(x, weight, scale)
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _norm_back(grad, *ctx.saved_tensors), None, None, None


class _LogProbs(torch.autograd.Function):
    """log softmax(hidden W')[target], a few rows at a time."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        ctx.few = max(64, FEW_LOGITS // len(weight) // 64 * 64)
        logps, found = [], []
        for rows, wanted in zip(hidden.split(ctx.few), targets.split(ctx.few), strict=True):
            logps.append(torch.log_softmax((rows @ weight.t()).float(), -1))
            found.append(logps[-1].gather(1, wanted[:, None])[:, 0])
            if not ctx.needs_input_grad[0]:
                logps.clear()
        ctx.save_for_backward(weight, targets, *logps)
        return torch.cat(found)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight, targets, *logps), found = ctx.saved_tensors, []
        for logp, wanted, given in zip(logps, targets.split(ctx.few), grad[:, None].split(ctx.few), strict=True):
            pull = torch.exp(logp).mul_(-given).scatter_add_(1, wanted[:, None], given)
            found.append(pull.to(weight.dtype) @ weight)
        return torch.cat(found), None, None


def _normed(x: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x / rms(x) times a weight, in `dtype`, and 1 / rms(x) in float32."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return (wide * scale).mul_(weight).to(dtype), scale


def _norm_back(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    straight, pull = x.float() * scale, grad.float() * weight
    along = (pull * straight).mean(-1, keepdim=True)
    return pull.addcmul_(straight, along, value=-1).mul_(scale).to(x.dtype)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, heads, d] turned by its position: x cos + (x with its halves swapped) sin, in float32; the result in x's type."""
    wide = x.float()
    return (wide * cos).addcmul_(wide.roll(wide.shape[-1] // 2, -1), sin).to(x.dtype)


def _linear(module: nn.Module) -> _Linear | None:
    """The layer as this module computes it; None where it cannot."""
    if type(module) is nn.Linear:
        return _Linear(module.weight, module.bias)
    from peft.tuners.lora.layer import Linear  # slow to import; whoever has an adapter has it

    if type(module) is not Linear or type(module.base_layer) is not nn.Linear:
        return None
    plain = _Linear(module.base_layer.weight, module.base_layer.bias)
    if module.merged or module.disable_adapters:
        return plain
    if len(module.active_adapters) != 1 or (name := module.active_adapters[0]) not in module.lora_A:
        return None
    fits = (name not in module.lora_variant and not module.fan_in_fan_out and not module.lora_bias[name]
            and getattr(module.lora_dropout[name], "p", 0.0) == 0.0)
    low = module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name]
    return plain._replace(a=low[0], b=low[1], scale=low[2]) if fits else None


def _is_llamas(layer: nn.Module) -> bool:
    """Whether it is built as Llama's, with projections that can be joined; what it computes is tried out."""
    parts = dict(layer.named_children())
    if set(parts) != PARTS or "forward" in vars(layer) or getattr(layer, "gradient_checkpointing", False):
        return False
    inner = {name: module for part in ("self_attn", "mlp") for name, module in parts[part].named_children() if name != "act_fn"}
    if set(inner) != {name for names in TOGETHER for name in names}:
        return False
    found = [[_linear(inner[name]) for name in names] for names in TOGETHER]
    norms = [parts["input_layernorm"], parts["post_attention_layernorm"]]
    alike = [None not in group and len({(one.scale, one.a is None, one.bias is None) for one in group}) == 1 for group in found]
    return all(alike) and all(hasattr(norm, "variance_epsilon") for norm in norms)


@torch.no_grad()
def _gives_the_same(made: Decoder) -> bool:
    """Whether both agree on a made-up row of six tokens, of which the last three are wanted."""
    ids, segments = torch.arange(1, 7)[None], torch.tensor([[0, 0, 0, 1, 1, 1]])
    targets = torch.where(segments == 1, ids, IGNORE)
    batch = {"input_ids": ids, "position_ids": ids - 1, "segments": segments, "targets": targets}
    mask, training = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril(), made.whole.training
    made.whole.eval()
    with torch.autocast("cpu", enabled=False):
        theirs = made.whole(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[0, 3:]
        ours = made(batch, mask)[:3]
    made.whole.train(training)
    return bool((ours - theirs).norm() <= 1e-2 * theirs.norm())
