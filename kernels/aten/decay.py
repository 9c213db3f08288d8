"""Decays inside one chunk: scores between its tokens, and factors from its start and to its end.

Everything is built from sums of the log decays that lie *between* two tokens, each summed on its own; nothing is the
difference of two cumulative sums. So exponents are at most 0, a log decay of -1e4 next to one of -1e-4 costs no
precision, and -inf is a factor of exactly 0 with a gradient of exactly 0.

Shapes: q and k are ``[B, G, 1, N, C, K]``, what belongs to a head is ``[B, G, R, N, C, ...]``. Gradients of q and k
are folded back over R. One object serves one forward and at most one backward pass and collects the gradient of the
log decay on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

# -inf stands for a decay of 0. It must not meet the zeros of an interval table (0 * inf), and this times any number of
# tokens is still finite in float32.
_LOWEST = -1e30


class ChunkDecay(Protocol):
    """Decay inside chunks; ``rows`` are queries or keys that look at the keys ``k``."""

    def scores(self, rows: Sequence[Tensor], k: Tensor) -> list[Tensor]: ...  # noqa: D102
    def scores_grad(  # noqa: D102
        self, rows: Sequence[Tensor], k: Tensor, scores: Sequence[Tensor], dscores: Sequence[Tensor]
    ) -> tuple[list[Tensor], Tensor]: ...
    def head(self, x: Tensor) -> Tensor: ...  # noqa: D102
    def head_grad(self, y: Tensor, dy: Tensor) -> Tensor: ...  # noqa: D102
    def tail(self, x: Tensor) -> Tensor: ...  # noqa: D102
    def tail_grad(self, y: Tensor, dy: Tensor) -> Tensor: ...  # noqa: D102
    def total(self) -> Tensor | None: ...  # noqa: D102
    def total_grad(self, dtotal: Tensor) -> None: ...  # noqa: D102
    def gradient(self) -> Tensor | None: ...  # noqa: D102


def fold(x: Tensor) -> Tensor:
    """Sum over the heads of a group: ``[B, G, R, ...] -> [B, G, 1, ...]``."""
    return x if x.shape[2] == 1 else x.sum(2, keepdim=True)


class NoDecay:
    """A decay of 1."""

    def scores(self, rows: Sequence[Tensor], k: Tensor) -> list[Tensor]:
        """Causal scores ``[B, G, 1, N, C, C]`` of each of ``rows``."""
        return [(r @ k.mT).tril_() for r in rows]

    def scores_grad(
        self, rows: Sequence[Tensor], k: Tensor, scores: Sequence[Tensor], dscores: Sequence[Tensor]
    ) -> tuple[list[Tensor], Tensor]:
        """Gradients of :meth:`scores` with respect to rows and k."""
        folded = [fold(d).tril() for d in dscores]
        dk = _sum([d.mT @ r for d, r in zip(folded, rows, strict=True)])
        return [d @ k for d in folded], dk

    def head(self, x: Tensor) -> Tensor:
        """``x`` times the decay from the start of the chunk."""
        return x

    def head_grad(self, y: Tensor, dy: Tensor) -> Tensor:
        """Gradient of :meth:`head` with respect to ``x``."""
        return fold(dy)

    tail, tail_grad = head, head_grad

    def total(self) -> Tensor | None:
        """Log decay of whole chunks (None: 0)."""
        return None

    def total_grad(self, dtotal: Tensor) -> None:
        """Take in a gradient of :meth:`total`."""

    def gradient(self) -> Tensor | None:
        """Gradient of the log decay."""
        return None


class ScalarDecay:
    """One log decay per token and head, ``g [B, G, R, N, C]``."""

    def __init__(self, g: Tensor) -> None:
        g = g.clamp(min=_LOWEST)
        size = g.shape[-1]
        table, bias = _intervals(size, g.dtype, g.device)
        # The sum over s < u <= t of g[u], for all (t, s) at once, is a GEMM with a 0/1 table; the bias masks s > t.
        self.factor = (
            torch.addmm(bias, g.reshape(-1, size), table).exp_().unflatten(-1, (size, size)).view(*g.shape, size)
        )
        self.from_start = g.cumsum(-1)
        self.to_end = _exclusive_to_end(g)
        self.grad: dict[str, Tensor] = {}

    def scores(self, rows: Sequence[Tensor], k: Tensor) -> list[Tensor]:
        """Causal decayed scores ``[B, G, R, N, C, C]`` of each of ``rows``."""
        return [r @ k.mT * self.factor for r in rows]

    def scores_grad(
        self, rows: Sequence[Tensor], k: Tensor, scores: Sequence[Tensor], dscores: Sequence[Tensor]
    ) -> tuple[list[Tensor], Tensor]:
        """Gradients of :meth:`scores` with respect to rows and k."""
        for s, d in zip(scores, dscores, strict=True):
            self._collect("scores", s * d)
        folded = [fold(d * self.factor) for d in dscores]
        dk = _sum([d.mT @ r for d, r in zip(folded, rows, strict=True)])
        return [d @ k for d in folded], dk

    def head(self, x: Tensor) -> Tensor:
        """``x`` times the decay from the start of the chunk, up to and with each token."""
        return x * self.from_start.exp()[..., None]

    def head_grad(self, y: Tensor, dy: Tensor) -> Tensor:
        """Gradient of :meth:`head`, ``y`` being its result, with respect to ``x``."""
        self.start_grad((y * dy).sum(-1))
        return fold(dy * self.from_start.exp()[..., None])

    def start_grad(self, d: Tensor) -> None:
        """Take in a gradient of :attr:`from_start`."""
        self._collect("start", d)

    def tail(self, x: Tensor) -> Tensor:
        """``x`` times the decay after each token, to the end of the chunk."""
        return x * self.to_end.exp()[..., None]

    def tail_grad(self, y: Tensor, dy: Tensor) -> Tensor:
        """Gradient of :meth:`tail`, ``y`` being its result, with respect to ``x``."""
        self._collect("end", (y * dy).sum(-1))
        return fold(dy * self.to_end.exp()[..., None])

    def total(self) -> Tensor:
        """Log decay of whole chunks, ``[B, G, R, N]``."""
        return self.from_start[..., -1]

    def total_grad(self, dtotal: Tensor) -> None:
        """Take in a gradient of :meth:`total`."""
        self._collect("total", dtotal)

    def gradient(self) -> Tensor:
        """Gradient of the log decay, ``[B, G, R, N, C]``."""
        g = torch.zeros_like(self.from_start)
        if "scores" in self.grad:
            size = g.shape[-1]
            table, _ = _intervals(size, g.dtype, g.device)
            g += (self.grad["scores"].reshape(-1, size * size) @ table.T).view(g.shape)
        if "start" in self.grad:
            g += self.grad["start"].flip(-1).cumsum(-1).flip(-1)
        if "end" in self.grad:
            g[..., 1:] += self.grad["end"].cumsum(-1)[..., :-1]
        if "total" in self.grad:
            g += self.grad["total"][..., None]
        return g

    def _collect(self, name: str, d: Tensor) -> None:
        self.grad[name] = self.grad[name].add_(d) if name in self.grad else d


class ChannelDecay:
    """One log decay per token, head and key channel, ``g [B, G, R, N, C, K]``.

    The scores of two tokens need a factor per channel between them. For each scale ``h = 1, 2, 4, ...`` tokens in the
    right half of a block of ``2 h`` see those in its left half through the point between the halves: queries decayed
    from there, keys decayed to there, both by exponents of at most 0, and one GEMM. Every pair of tokens belongs to
    exactly one scale, which is its level, and no tensor is larger than the operands.
    """

    def __init__(self, g: Tensor) -> None:
        self.g = g
        self.from_start = g.clone()
        self.to_end = torch.zeros_like(g)
        for h in _scales(g.shape[-2]):
            self._widen(self.from_start, self.to_end, h)
        self.kept: list[tuple[Tensor, Tensor]] = []  # gradients at each scale, from scores_grad
        self.grad_start: Tensor | None = None
        self.grad_end: Tensor | None = None

    @staticmethod
    def _widen(start: Tensor, end: Tensor, h: int) -> None:
        """From sums within blocks of ``h`` tokens to sums within blocks of ``2 h``, in place."""
        s, e = _halves(start, h), _halves(end, h)
        left, right = s[..., 0, -1:, :].clone(), s[..., 1, -1:, :].clone()
        s[..., 1, :, :] += left
        e[..., 0, :, :] += right

    def scores(self, rows: Sequence[Tensor], k: Tensor) -> list[Tensor]:
        """Causal decayed scores ``[B, G, R, N, C, C]`` of each of ``rows``."""
        size = self.g.shape[-2]
        out = [self.g.new_zeros(*self.g.shape[:-1], size) for _ in rows]
        for r, o in zip(rows, out, strict=True):
            o.diagonal(dim1=-2, dim2=-1).copy_((r * k).sum(-1))
        start, end = self.g.clone(), torch.zeros_like(self.g)
        for h in _scales(size):
            keys = _halves(k, h)[..., 0, :, :] * _halves(end, h)[..., 0, :, :].exp()
            factor = _halves(start, h)[..., 1, :, :].exp()
            for r, o in zip(rows, out, strict=True):
                _blocks(o, h).copy_((_halves(r, h)[..., 1, :, :] * factor) @ keys.mT)
            self._widen(start, end, h)
        return out

    def scores_grad(
        self, rows: Sequence[Tensor], k: Tensor, scores: Sequence[Tensor], dscores: Sequence[Tensor]
    ) -> tuple[list[Tensor], Tensor]:
        """Gradients of :meth:`scores` with respect to rows and k."""
        diagonals = [d.diagonal(dim1=-2, dim2=-1)[..., None] for d in dscores]
        drows = [fold(d * k) for d in diagonals]
        dk = _sum([fold(d * r) for d, r in zip(diagonals, rows, strict=True)])
        start, end = self.g.clone(), torch.zeros_like(self.g)
        for h in _scales(self.g.shape[-2]):
            decay_k, decay_r = _halves(end, h)[..., 0, :, :].exp(), _halves(start, h)[..., 1, :, :].exp()
            keys = _halves(k, h)[..., 0, :, :] * decay_k
            dkeys, dstart = torch.zeros_like(keys), torch.zeros_like(keys)
            for r, d, dr in zip(rows, dscores, drows, strict=True):
                block, looking = _blocks(d, h), _halves(r, h)[..., 1, :, :] * decay_r
                dkeys += block.mT @ looking
                dlooking = block @ keys
                dstart.addcmul_(dlooking, looking)
                _halves(dr, h)[..., 1, :, :] += fold(dlooking.mul_(decay_r))
            self.kept.append((dstart, dkeys * keys))
            _halves(dk, h)[..., 0, :, :] += fold(dkeys.mul_(decay_k))
            self._widen(start, end, h)
        return drows, dk

    def head(self, x: Tensor) -> Tensor:
        """``x`` times the decay from the start of the chunk, up to and with each token."""
        return x * self.from_start.exp()

    def head_grad(self, y: Tensor, dy: Tensor) -> Tensor:
        """Gradient of :meth:`head`, ``y`` being its result, with respect to ``x``."""
        self.grad_start = _plus(self.grad_start, y * dy)
        return fold(dy * self.from_start.exp())

    def tail(self, x: Tensor) -> Tensor:
        """``x`` times the decay after each token, to the end of the chunk."""
        return x * self.to_end.exp()

    def tail_grad(self, y: Tensor, dy: Tensor) -> Tensor:
        """Gradient of :meth:`tail`, ``y`` being its result, with respect to ``x``."""
        self.grad_end = _plus(self.grad_end, y * dy)
        return fold(dy * self.to_end.exp())

    def total(self) -> Tensor:
        """Log decay of whole chunks, ``[B, G, R, N, K]``."""
        return self.from_start[..., -1, :]

    def total_grad(self, dtotal: Tensor) -> None:
        """Take in a gradient of :meth:`total`."""
        if self.grad_start is None:
            self.grad_start = torch.zeros_like(self.g)
        self.grad_start[..., -1, :] += dtotal

    def gradient(self) -> Tensor:
        """Gradient of the log decay, ``[B, G, R, N, C, K]``: :meth:`_widen` in reverse, scale by scale."""
        start = torch.zeros_like(self.g) if self.grad_start is None else self.grad_start
        end = torch.zeros_like(self.g) if self.grad_end is None else self.grad_end
        for h in reversed(_scales(self.g.shape[-2])):
            s, e = _halves(start, h), _halves(end, h)
            left, right = s[..., 1, :, :].sum(-2), e[..., 0, :, :].sum(-2)
            s[..., 0, -1, :] += left
            s[..., 1, -1, :] += right
            if self.kept:
                dstart, dend = self.kept.pop()
                s[..., 1, :, :] += dstart
                e[..., 0, :, :] += dend
        return start


@lru_cache(maxsize=16)
def _intervals(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """``[C, C * C]`` with 1 at ``(u, (t, s))`` where ``s < u <= t``, and ``[C * C]`` with -inf where ``s > t``."""
    i = torch.arange(size, device=device)
    u, t, s = i[:, None, None], i[None, :, None], i[None, None, :]
    table = ((s < u) & (u <= t)).to(dtype).view(size, size * size)
    bias = torch.zeros(size, size, dtype=dtype, device=device).masked_fill_(s[0] > t[0], -torch.inf)
    return table, bias.view(-1)


def _exclusive_to_end(g: Tensor) -> Tensor:
    """Sum of ``g`` after each token, to the end of the last axis."""
    after = torch.zeros_like(g)
    after[..., :-1] = g[..., 1:]
    return after.flip(-1).cumsum(-1).flip(-1)


def _scales(size: int) -> list[int]:
    return [1 << i for i in range(size.bit_length() - 1)]


def _halves(x: Tensor, h: int) -> Tensor:
    """``[..., C, K] -> [..., C / 2h, 2, h, K]`` as a view."""
    return x.unflatten(-2, (-1, 2, h))


def _blocks(x: Tensor, h: int) -> Tensor:
    """The blocks of scores ``[..., C, C]`` from right halves to left halves, as a view ``[..., C / 2h, h, h]``."""
    n = x.shape[-1] // (2 * h)
    split = x.unflatten(-1, (n, 2, h))[..., 0, :].unflatten(-3, (n, 2, h))[..., 1, :, :, :]  # [..., n, h, n, h]
    return split.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def _sum(terms: Sequence[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total.add_(term)
    return total


def _plus(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a.add_(b)
