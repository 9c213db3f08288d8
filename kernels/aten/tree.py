"""The log-linear tree over chunks (docs/decisions/tree-over-chunks.md; arXiv 2506.04761, section 3).

Level ``m`` sees chunks as pairs of blocks of ``2 ** m``. The rows of every right block read the state of their left
sibling with the weight of that level and are then pulled back over it, so that after the last level every row reads at
the start of the sequence. Blocks pair up for the next level. A row reads one state per level, each by one GEMM over a
whole block of rows: O(T log T) work in O(log T) steps, O(T) memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llcompile.kernels.aten.transitions import Transition, add_, zeros_like
from llcompile.kernels.grid import depth


class Segment(NamedTuple):
    """Right blocks of one level that have the same width: ``pairs`` of them, ``width`` chunks each."""

    first: int  # chunk at which the first of these pairs starts
    left: int  # index of the first left block among the blocks of this level
    pairs: int
    block: int  # chunks of a left block
    width: int  # chunks of a right block; less than ``block`` only for the last, partial one

    def rows(self, x: Any) -> Any:
        """The right blocks' rows of ``x [M, N, C, ...]`` as a view ``[M, pairs, width * C, ...]``."""
        if x is None:
            return None
        last = self.first + (self.pairs - 1) * 2 * self.block + self.block + self.width
        x = x[:, self.first : last]
        if self.pairs == 1:
            return x[:, None, self.block :].flatten(2, 3)
        return x.unflatten(1, (self.pairs, 2, self.block))[:, :, 1].flatten(2, 3)

    def lefts(self, x: Any) -> Any:
        """The left blocks among blocks ``x [M, n, ...]``, ``[M, pairs, ...]``."""
        return None if x is None else x[:, self.left : self.left + 2 * self.pairs : 2]


def segments(chunks: int, m: int) -> Iterator[Segment]:
    """Right blocks of level ``m`` among ``chunks`` chunks: the whole ones, then the partial one if there is one."""
    block = 1 << m
    pairs = chunks // (2 * block)
    if pairs:
        yield Segment(0, 0, pairs, block, block)
    first = pairs * 2 * block
    if chunks - first > block:
        yield Segment(first, 2 * pairs, 1, block, chunks - first - block)


def combine(kind: Transition, p: Any, x: Tensor) -> tuple[Any, Tensor]:
    """Blocks of one level -> blocks of the next; an unpaired last block moves up as it is."""
    n = x.shape[1]
    even = n - n % 2
    new_x = kind.push(_at(p, 1, even), x[:, 0:even:2])
    new_x = (
        new_x + x[:, 1:even:2]
        if new_x is x
        else new_x.add_(x[:, 1:even:2])
        if p is not None
        else (x[:, 0:even:2] + x[:, 1:even:2])
    )
    new_p = kind.compose(_at(p, 1, even), _at(p, 0, even))
    if n % 2:
        new_x = torch.cat([new_x, x[:, -1:]], 1)
        new_p = None if p is None else torch.cat([new_p, p[:, -1:]], 1)
    return new_p, new_x


def combine_grad(kind: Transition, p: Any, x: Tensor, dp: Any, dx: Tensor) -> tuple[Any, Tensor]:
    """Gradients of :func:`combine` with respect to the blocks of the lower level."""
    n = x.shape[1]
    pairs, even = n // 2, n - n % 2
    right, left = _at(p, 1, even), _at(p, 0, even)
    low_x, low_p = torch.empty_like(x), None if p is None else torch.empty_like(p)
    low_x[:, 1:even:2] = dx[:, :pairs]
    low_x[:, 0:even:2] = kind.push_t(right, dx[:, :pairs])
    if p is not None and low_p is not None:
        d_right, d_left = kind.compose_grad(right, left, dp[:, :pairs])
        low_p[:, 1:even:2] = d_right + kind.push_p_grad(right, x[:, 0:even:2], dx[:, :pairs])
        low_p[:, 0:even:2] = d_left
    if n % 2:
        low_x[:, -1:] = dx[:, -1:]
        if low_p is not None:
            low_p[:, -1:] = dp[:, -1:]
    return low_p, low_x


def _at(p: Any, parity: int, even: int) -> Any:
    return None if p is None else p[:, parity:even:2]


class Tree:
    """One pass through the tree: reads into ``o``, pulls ``rows`` back in place, and can run in reverse.

    Args:
        kind: the algebra of the transitions. q: ``[M, N, C, K]`` where the kind shares queries, else None.
        w: ``[M, N, C, R, depth]``. keep: remember what the reverse pass needs.
    """

    def __init__(self, kind: Transition, q: Tensor | None, w: Tensor, keep: bool) -> None:
        self.kind, self.q, self.w, self.keep = kind, q, w, keep
        self.nodes: list[tuple[Any, Tensor]] = []  # blocks of each level
        self.rows: list[list[Any]] = []  # rows as they were read, of each segment of each level

    def forward(self, o: Tensor | None, rows: Any, p: Any, x: Tensor) -> Iterator[tuple[Any, Tensor]]:
        """Walk up the levels, yielding each level's blocks ``p, x``.

        Adds to ``o [M, N, C, R, V]`` (None: read nothing, only keep) and overwrites ``rows [M, N, C, ...]``.
        """
        chunks = self.w.shape[1]
        for m in range(depth(chunks)):
            if self.keep:
                self.nodes.append((p, x))
                self.rows.append([])
            yield p, x
            for part in segments(chunks, m):
                row = part.rows(rows)
                if o is not None:
                    self.kind.read(part.rows(o), part.rows(self.q), row, part.lefts(x), part.rows(self.w)[..., m])
                if row is not None:
                    if self.keep:
                        self.rows[m].append(row.clone())
                    row.copy_(self.kind.pull(row, part.lefts(p)))
                elif self.keep:
                    self.rows[m].append(None)
            if m + 1 < depth(chunks):
                p, x = combine(self.kind, p, x)

    def backward(
        self,
        do: Tensor,
        drows: Any,
        dq: Tensor | None,
        dw: Tensor,
        add_level_grad: Callable[[int, Any, Tensor], None] | None,
    ) -> tuple[Any, Tensor | None]:
        """Run in reverse.

        ``drows`` is the gradient of the pulled-back rows and becomes that of the first rows, in place; ``dq`` and
        ``dw`` are added to; ``add_level_grad`` adds what else is known of the gradients of a level's blocks.
        Returns the gradients of the chunks' transitions and contributions (None without levels).
        """
        chunks = self.w.shape[1]
        dp: Any = None
        dx: Tensor | None = None
        for m in reversed(range(depth(chunks))):
            p, x = self.nodes.pop()
            if dx is None:
                dp, dx = zeros_like(p), torch.zeros_like(x)
            else:
                dp, dx = combine_grad(self.kind, p, x, dp, dx)
            if add_level_grad is not None:
                add_level_grad(m, dp, dx)
            kept = self.rows.pop()
            for part, row in zip(segments(chunks, m), kept, strict=True):
                self._segment_grad(part, m, row, p, x, do, drows, dq, dw, dp, dx)
        return dp, dx

    def _segment_grad(
        self,
        part: Segment,
        m: int,
        row: Any,
        p: Any,
        x: Tensor,
        do: Tensor,
        drows: Any,
        dq: Tensor | None,
        dw: Tensor,
        dp: Any,
        dx: Tensor,
    ) -> None:
        w = part.rows(self.w)[..., m]
        dq_part, drow, dx_left, dw_part = self.kind.read_grad(part.rows(do), part.rows(self.q), row, part.lefts(x), w)
        part.lefts(dx).add_(dx_left)
        if dw_part is not None:
            part.rows(dw)[..., m] = dw_part
        if dq is not None and dq_part is not None:
            part.rows(dq).add_(dq_part)
        if drows is not None:
            target = part.rows(drows)
            pulled, dp_left = self.kind.pull_grad(row, part.lefts(p), target)
            target.copy_(add_(drow, pulled))
            if dp is not None:
                part.lefts(dp).add_(dp_left)
