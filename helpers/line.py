"""A batch of rows as one line of tokens: what several prompts begin with stands there once, and padding not at all.

Most of a model looks at one token at a time, so it may read the tokens of all rows in a line [T, hidden]. Attention alone
needs rows, and finds them there again.
"""

from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

LINE = 64  # tokens are filled up to a multiple of it, long lines of twice that: few shapes, for each costs a new kernel
WIDTH = 16  # and rows to a multiple of it
IGNORE = -100
SOFT = -1  # stands in a prompt for a token that is given as a vector


class Line:
    """Where the tokens of a batch (helpers.dpo.pack) stand in the line, and which of them predict an answer's token.

    tokens [T]: the place of each in the batch, of n * L. answers [A]: the `wanted` tokens that have a target, in the order
    of the batch. Both are filled up with the first token to a multiple of LINE. rows, ends: the way between rows and all
    tokens, and those of answers; places [n, longest]: where in its row each of the latter stands. behind [n]: which head
    stands in front of each row; rows behind different ones have nothing in common.
    """

    def __init__(self, batch: dict[str, Tensor], behind: Tensor | None = None) -> None:
        segments, targets = batch["segments"], batch["targets"]
        (n, length), device, prompt = segments.shape, segments.device, segments == 0
        row = torch.arange(n, device=device)[:, None]
        first = torch.where(prompt, _first_with(batch["input_ids"], prompt, behind), row)
        own = (segments >= 0) & (first == row)
        number = own.flatten().cumsum(0) - 1
        there = torch.arange(length, device=device) + length * first
        slots = number[there].clamp(min=0) * (segments >= 0)
        self.tokens = _filled(own.flatten().nonzero()[:, 0])
        self.rows = Rows(slots, self.tokens)
        has = targets != IGNORE
        counts, self.wanted = has.sum(1), int(has.sum())
        self.answers = _filled(slots[has])
        at = torch.arange(-(-int(counts.max()) // WIDTH) * WIDTH, device=device)
        self.places = (prompt.sum(1, keepdim=True) + at).clamp(max=length - 1)
        mine, before = at < counts[:, None], (counts.cumsum(0) - counts)[:, None]
        self.ends = Rows((before + at) * mine, _filled(mine.flatten().nonzero()[:, 0]))


class Rows:
    """The way from tokens to rows and back. slots [n, L]: the token in each place; taken [T]: a place of each token."""

    def __init__(self, slots: Tensor, taken: Tensor) -> None:
        self.slots, self.taken = slots, taken
        self.known: dict[tuple[int, int], tuple[Places, Places]] = {}

    def spread(self, heads: int, kinds: int = 1) -> "Places":
        """From [T * heads, d] to [kinds * n * heads / kinds * L, d]; kinds: 2 where half of the heads are keys, half values."""
        return self._ways(heads, kinds)[0]

    def collect(self, heads: int) -> "Places":
        """From [n * heads * L, d] back to [T * heads, d]."""
        return self._ways(heads, 1)[1]

    def _ways(self, heads: int, kinds: int) -> tuple["Places", "Places"]:
        if (heads, kinds) not in self.known:
            (n, length), head = self.slots.shape, torch.arange(heads, device=self.slots.device)
            there = (self.slots[:, None] * heads + head.view(kinds, 1, -1, 1)).flatten()
            row, place = self.taken[:, None] // length, self.taken[:, None] % length
            back = ((row * heads + head) * length + place).flatten()
            self.known[heads, kinds] = Places(there, len(self.taken) * heads), Places(back, n * heads * length)
        return self.known[heads, kinds]


class Places:
    """Some of `size` rows, any of them any number of times: index [m]."""

    def __init__(self, index: Tensor, size: int) -> None:
        self.index, self.size = index, size

    def take(self, x: Tensor) -> Tensor:
        """x [size, d] to [m, d]."""
        return x.index_select(0, self.index)

    def give(self, x: Tensor) -> Tensor:
        """The way back of a gradient [m, d]: each of the rows [size, d] has the sum of what was taken from it."""
        return embedding_bag(self._order, x, self._begins, mode="sum")

    @cached_property
    def _order(self) -> Tensor:
        return self.index.argsort(stable=True)

    @cached_property
    def _begins(self) -> Tensor:
        counts = torch.bincount(self.index, minlength=self.size)
        return counts.cumsum(0) - counts


def _first_with(ids: Tensor, prompt: Tensor, behind: Tensor | None) -> Tensor:
    """For each place of a prompt the first row whose prompt is the same up to there, int64 [n, L]; elsewhere anything."""
    n, itself = len(ids), torch.eye(len(ids), dtype=torch.bool, device=ids.device)[:, :, None]
    other = (ids[:, None] != ids[None]) | ~prompt[None] | (ids == SOFT)[None]
    if behind is not None:
        other |= (behind[:, None] != behind[None])[:, :, None]
    same = (other.cumsum(-1) == 0) | itself
    return (same * torch.arange(n, 0, -1, device=ids.device)[:, None]).argmax(1)


def _filled(tokens: Tensor) -> Tensor:
    return pad(tokens, (0, -len(tokens) % (LINE if len(tokens) < 16 * LINE else 2 * LINE)))
