"""Transitions: what a stretch of tokens does to a state that passes through it, and to a query pulled back over it.

Two kinds, a factor per key channel and a matrix, share one small algebra:

* `push(p, x)`: states `x [M, n, K, V]` carried through `p`;
* `compose(right, left)`: first `left`, then `right`;
* `pull(rows, p)`: queries `[M, n, r, K]` that read after `p`, rewritten to read before it.

Pulling queries back instead of pushing states forward is what keeps the work of the tree in a few large GEMMs: a block
state is written once and read once. Logarithms of decays are only ever added, so exponents stay at most 0 and a decay
of 0 (-inf) needs no special case. `M` merges batch and heads, `n` counts blocks.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Transition(Protocol):
    """The algebra above; `p` is whatever the kind stores."""

    def push(self, p: Tensor, x: Tensor) -> Tensor: ...  # noqa: D102
    def compose(self, right: Tensor, left: Tensor) -> Tensor: ...  # noqa: D102
    def pull(self, rows: Tensor, p: Tensor) -> Tensor: ...  # noqa: D102


class Diagonal:
    """A factor per key channel, or one for all, stored as its logarithm `p [M, n, K or 1]`."""

    def push(self, p: Tensor, x: Tensor) -> Tensor:
        """`exp(p) x`, channel by channel."""
        return p.exp()[..., None] * x

    def compose(self, right: Tensor, left: Tensor) -> Tensor:
        """Logarithms add."""
        return right + left

    def pull(self, rows: Tensor, p: Tensor) -> Tensor:
        """Queries take on the factor."""
        return rows * p.exp()[:, :, None]


class Dense:
    """A matrix `p [M, n, K, K]` that acts on states from the left."""

    def push(self, p: Tensor, x: Tensor) -> Tensor:
        """`p x`."""
        return p @ x

    def compose(self, right: Tensor, left: Tensor) -> Tensor:
        """The product."""
        return right @ left

    def pull(self, rows: Tensor, p: Tensor) -> Tensor:
        """Queries (rows) times the matrix."""
        return rows @ p
