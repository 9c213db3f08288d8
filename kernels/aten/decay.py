"""Decays inside one chunk: scores between its tokens, and factors from its start and to its end.

Everything is built from sums of the log decays that lie *between* two tokens, each summed on its own; nothing is the
difference of two cumulative sums. So exponents are at most 0, a log decay of -1e4 next to one of -1e-4 costs no
precision, and -inf is a factor of exactly 0 with a gradient of exactly 0.

Shapes: `rows` are queries or keys that look at the keys `k`, all `[B, G, 1, N, C, K]`; what belongs to a head is
`[B, G, R, N, C, ...]`; `scores` are causal, `[B, G, R or 1, N, C, C]`, one tensor for each of `rows`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

# -inf stands for a decay of 0. It must not meet the zeros of an interval table (0 * inf), and this times any number of
# tokens is still finite in float32.
_LOWEST = -1e30


class NoDecay:
    """A decay of 1."""

    def __init__(self, rows: Sequence[Tensor], k: Tensor) -> None:
        self.scores = [(r @ k.mT).tril_() for r in rows]
        self.total: Tensor | None = None  # log decay of whole chunks

    def head(self, x: Tensor) -> Tensor:
        """`x` times the decay from the start of the chunk, up to and with each token."""
        return x

    def tail(self, x: Tensor) -> Tensor:
        """`x` times the decay after each token, to the end of the chunk."""
        return x


class ScalarDecay(NoDecay):
    """One log decay per token and head, `g [B, G, R, N, C]`; `total [B, G, R, N]`."""

    def __init__(self, g: Tensor, rows: Sequence[Tensor], k: Tensor) -> None:
        g = g.clamp(min=_LOWEST)
        size = g.shape[-1]
        table, bias = _intervals(size, g.dtype, g.device)
        # The sum over s < u <= t of g[u], for all (t, s) at once, is a GEMM with a 0/1 table; the bias masks s > t.
        factor = torch.addmm(bias, g.reshape(-1, size), table).exp_().view(*g.shape, size)
        self.scores = [r @ k.mT * factor for r in rows]
        self.from_start = g.cumsum(-1)
        self.to_end = pad(g[..., 1:], (0, 1)).flip(-1).cumsum(-1).flip(-1)
        self.total = self.from_start[..., -1]

    def head(self, x: Tensor) -> Tensor:
        """See the base."""
        return x * self.from_start.exp()[..., None]

    def tail(self, x: Tensor) -> Tensor:
        """See the base."""
        return x * self.to_end.exp()[..., None]


class ChannelDecay(NoDecay):
    """One log decay per token, head and key channel, `g [B, G, R, N, C, K]`; `total [B, G, R, N, K]`.

    The scores of two tokens need a factor per channel between them. For each scale `h = 1, 2, 4, ...` tokens in the
    right half of a block of `2 h` see those in its left half through the point between the halves: queries decayed
    from there, keys decayed to there, both by exponents of at most 0, and one GEMM. Every pair of tokens belongs to
    exactly one scale, which is its level, and no tensor is larger than the operands.
    """

    def __init__(self, g: Tensor, rows: Sequence[Tensor], k: Tensor) -> None:
        start, end = g.clone(), torch.zeros_like(g)  # sums from the start and to the end of blocks of h tokens
        across: list[list[Tensor]] = [[] for _ in rows]  # scores of right halves with left ones, at each scale
        for h in _scales(g.shape[-2]):
            start, end, from_left, to_right = _Widened.apply(start, end, h)
            keys = _halves(k, h)[0] * to_right
            for r, found in zip(rows, across, strict=True):
                found.append((_halves(r, h)[1] * from_left) @ keys.mT)
        own = [(r * k).sum(-1).expand(g.shape[:-1]) for r in rows]
        self.scores = [_Assembled.apply(o, *found) for o, found in zip(own, across, strict=True)]
        self.from_start, self.to_end, self.total = start, end, start[..., -1, :]

    def head(self, x: Tensor) -> Tensor:
        """See the base."""
        return x * self.from_start.exp()

    def tail(self, x: Tensor) -> Tensor:
        """See the base."""
        return x * self.to_end.exp()


class _Widened(torch.autograd.Function):
    """From sums within blocks of `h` tokens to sums within blocks of `2 h`, in place, and the factors between.

    Its own gradient, in place, too: through functional sums, a backward pass took a quarter more time.
    """

    @staticmethod
    def forward(ctx: Any, start: Tensor, end: Tensor, h: int) -> tuple[Tensor, ...]:
        ctx.mark_dirty(start, end)
        (start_left, start_right), (end_left, _) = _halves(start, h), _halves(end, h)
        factors = start_right.exp(), end_left.exp()  # from the point between the halves, and to it
        left, right = start_left[..., -1:, :].clone(), start_right[..., -1:, :].clone()
        start_right += left
        end_left += right
        ctx.h = h
        ctx.save_for_backward(*factors)
        return start, end, *factors

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, start: Tensor, end: Tensor, *factors: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        (start_left, start_right), (end_left, _) = _halves(start, ctx.h), _halves(end, ctx.h)
        left, right = start_right.sum(-2), end_left.sum(-2)
        for sums, d, factor in zip((start_right, end_left), factors, ctx.saved_tensors, strict=True):
            sums.addcmul_(d, factor)
        start_left[..., -1, :] += left
        start_right[..., -1, :] += right
        return start, end, None


class _Assembled(torch.autograd.Function):
    """Scores from their diagonal `[..., C]` and the blocks across halves at each scale, without a copy per scale."""

    @staticmethod
    def forward(ctx: Any, diagonal: Tensor, *across: Tensor) -> Tensor:
        scores = diagonal.new_zeros(*diagonal.shape, diagonal.shape[-1])
        scores.diagonal(dim1=-2, dim2=-1).copy_(diagonal)
        for x in across:
            _across(scores, x.shape[-1]).copy_(x)
        return scores

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return d.diagonal(dim1=-2, dim2=-1), *(_across(d, h) for h in _scales(d.shape[-1]))


@lru_cache(maxsize=16)
def _intervals(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """`[C, C * C]` with 1 at `(u, (t, s))` where `s < u <= t`, and `[C * C]` with -inf where `s > t`."""
    i = torch.arange(size, device=device)
    u, t, s = i[:, None, None], i[None, :, None], i[None, None, :]
    table = ((s < u) & (u <= t)).to(dtype).view(size, size * size)
    bias = torch.zeros(size, size, dtype=dtype, device=device).masked_fill_(s[0] > t[0], -torch.inf)
    return table, bias.view(-1)


def _scales(size: int) -> list[int]:
    return [1 << i for i in range(size.bit_length() - 1)]


def _halves(x: Tensor, h: int) -> tuple[Tensor, ...]:
    """The left and the right halves of blocks of `2 h` tokens: `[..., C, K] -> 2 x [..., C / 2h, h, K]`."""
    return x.unflatten(-2, (-1, 2, h)).unbind(-3)


def _across(scores: Tensor, h: int) -> Tensor:
    """The blocks of `[..., C, C]` from right halves to left halves, as a view `[..., C / 2h, h, h]`."""
    n = scores.shape[-1] // (2 * h)
    split = scores.unflatten(-1, (n, 2, h))[..., 0, :].unflatten(-3, (n, 2, h))[..., 1, :, :, :]  # [..., n, h, n, h]
    return split.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
