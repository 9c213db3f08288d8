"""The log-linear tree over chunks (docs/decisions/tree-over-chunks.md; arXiv 2506.04761, section 3).

Level `m` sees chunks as pairs of blocks of `2 ** m`. The rows of every right block read the state of their left
sibling with the weight of that level and are then pulled back over it, so that after the last level every row reads at
the start of the sequence. Blocks pair up for the next level. A row reads one state per level, each by one GEMM over a
whole block of rows: O(T log T) work in O(log T) steps, O(T) memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from llcompile.kernels.aten.transitions import Transition
from llcompile.kernels.grid import depth


def blocks(kind: Transition, p: Any, x: Tensor) -> Iterator[tuple[Any, Tensor]]:
    """The transitions and states of the blocks of each level, from those of the chunks `[M, N, ...]` on."""
    levels = depth(x.shape[1])
    for m in range(levels):
        yield p, x
        if m + 1 < levels:
            p, x = _combined(kind, p, x)


def _combined(kind: Transition, p: Any, x: Tensor) -> tuple[Any, Tensor]:
    """Blocks of one level -> blocks of the next; an unpaired last block moves up as it is."""
    left, right, rest = pairs(x)
    if p is None:
        return None, _with(left + right, rest)
    p_left, p_right, p_rest = pairs(p)
    pushed = kind.push(p_right, left).add_(right)
    return _with(kind.compose(p_right, p_left), p_rest), _with(pushed, rest)


def pairs(x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """The left and right blocks among blocks `[M, n, ...]`, and the last one where it has no sibling."""
    even = x.shape[1] & ~1
    whole, rest = (x, None) if even == x.shape[1] else x.split([even, 1], 1)
    left, right = whole.unflatten(1, (-1, 2)).unbind(2)
    return left, right, rest


def _with(x: Tensor, rest: Tensor | None) -> Tensor:
    return x if rest is None else torch.cat([x, rest], 1)


class Readers:
    """The rows of a sequence, as they read and are pulled back level by level.

    Args:
        kind: the algebra of the transitions. q: `[M, N, C, K]` where the kind shares queries, else None.
        rows: `[M, N, C, ...]`. w: `[M, N, C, R, depth]`. o: `[M, N, C, R, V]`.
        read: called with parts of `o`, q and rows, the states that they read, and weights.
        in_place: pull back in the memory of `rows`, which autograd is not to see.
    """

    def __init__(
        self, kind: Transition, q: Tensor | None, rows: Any, w: Tensor, o: Tensor, read: Any, in_place: bool
    ) -> None:
        self.kind, self.q, self.rows, self.w = kind, q, rows, w.unbind(-1)
        self.o, self.read, self.in_place = o, read, in_place

    def pass_level(self, m: int, p: Any, x: Tensor, pull: bool = True) -> None:
        """Read the left siblings among the blocks of level `m`, and go back over them where `pull` says so."""
        lefts, p_lefts = pairs(x)[0], None if p is None else pairs(p)[0]
        moved, first = [], 0
        parts = (_halves(t, m) for t in (self.o, self.q, self.rows, self.w[m]))
        for (_, o), (_, q), (before, after), (_, w) in zip(*parts, strict=False):
            last = first + o.shape[1]
            row = _flat(after)
            self.read(_flat(o), _flat(q), row, _part(lefts, first, last), _flat(w))
            if row is not None and pull:
                pulled = self.kind.pull(row, _part(p_lefts, first, last))
                if self.in_place:
                    row.copy_(pulled)
                else:
                    moved.append(torch.cat([before, pulled.view(after.shape)], 2).flatten(1, 2))
            first = last
        if moved:
            done = sum(t.shape[1] for t in moved)
            rest = [self.rows[:, done:]] if done < self.rows.shape[1] else []
            self.rows = torch.cat([*moved, *rest], 1)


def _part(x: Any, first: int, last: int) -> Any:
    return x if x is None or last - first == x.shape[1] else x[:, first:last]


def _halves(x: Any, m: int) -> list[tuple[Any, Any]]:
    """The left and right blocks of level `m` of `x [M, N, ...]`, each `[M, pairs, chunks, ...]`.

    First come those of the same width, then, where the last right block is narrower, that one with its sibling.
    """
    if x is None:
        return [(None, None)] * 2
    block, chunks = 1 << m, x.shape[1]
    count = chunks // (2 * block)
    whole = count * 2 * block
    found = []
    if count:
        found.append((x if whole == chunks else x[:, :whole]).unflatten(1, (count, 2, block)).unbind(2))
    if chunks - whole > block:
        found.append((x[:, None, whole : whole + block], x[:, None, whole + block :]))
    return found


def _flat(x: Any) -> Any:
    return None if x is None else x.flatten(2, 3)
