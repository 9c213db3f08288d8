"""Transitions: what a stretch of tokens does to a state that passes through it, and to a query pulled back over it.

Three kinds, one for each shape that a product of per-token transitions can have. All share one small algebra:

* `push(p, x)`: a state `x` carried through `p`; `push_t` by its transpose, and `push_p_grad` (for gradients);
* `compose(right, left)`: first `left`, then `right`;
* `pull(rows, p)`: queries that read after `p`, rewritten to read before it;
* `read(...)`: queries times states, weighed and added to an output; `read_dot`: for its gradients.

Pulling queries back instead of pushing states forward is what keeps the work of the tree in a few large GEMMs: a block
state is written once and read once. Logarithms of decays are only ever added, so exponents stay at most 0 and a decay
of 0 (-inf) needs no special case.

Shapes: `M` merges batch and group (or head), `n` counts blocks, `r` rows, `R` heads that share q and k.
States are `[M, n, K, R * V]`, outputs `[M, n, r, R, V]`, weights `[M, n, r, R]`.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from llcompile.kernels.aten.dot import dot


class Transition(Protocol):
    """The algebra above; `p` is whatever the kind stores (None: the identity)."""

    def push(self, p: Any, x: Tensor) -> Tensor: ...  # noqa: D102
    def push_t(self, p: Any, x: Tensor) -> Tensor: ...  # noqa: D102
    def push_p_grad(self, p: Any, x: Tensor, dy: Tensor) -> Any: ...  # noqa: D102
    def compose(self, right: Any, left: Any) -> Any: ...  # noqa: D102
    def pull(self, rows: Any, p: Any) -> Any: ...  # noqa: D102
    def read(self, o: Tensor, q: Tensor | None, rows: Any, x: Tensor, w: Tensor | None) -> None: ...  # noqa: D102
    def read_dot(self, do: Tensor, q: Tensor | None, rows: Any, x: Tensor, w: Tensor | None) -> Tensor: ...  # noqa: D102


class ScalarTransition:
    """A factor per head, stored as its logarithm `p [M, n, R]`; None stands for 1.

    Queries `q` are shared by the heads of a group and stay as they are; what is pulled back is the logarithm of each
    row's coefficient, `rows [M, n, r, R]` (None with `p`).
    """

    def __init__(self, repeat: int) -> None:
        self.repeat = repeat

    def _factor(self, p: Tensor, x: Tensor) -> Tensor:
        """`exp(p)` as a factor of the states `x`."""
        if self.repeat == 1:
            return p.exp()[..., None]  # [M, n, 1, 1]
        return p.exp().repeat_interleave(x.shape[-1] // self.repeat, -1)[..., None, :]  # [M, n, 1, R * V]

    def push(self, p: Tensor | None, x: Tensor) -> Tensor:
        """`exp(p) x`."""
        return x if p is None else self._factor(p, x) * x

    push_t = push

    def push_p_grad(self, p: Tensor, x: Tensor, dy: Tensor) -> Tensor:
        """Gradient of `push` with respect to `p`."""
        return (x * dy).sum(-2).unflatten(-1, (self.repeat, -1)).sum(-1) * p.exp()

    def compose(self, right: Tensor | None, left: Tensor | None) -> Tensor | None:
        """Logarithms add."""
        return None if right is None or left is None else right + left

    def pull(self, rows: Tensor | None, p: Tensor | None) -> Tensor | None:
        """The rows' coefficients take on the factor."""
        return None if rows is None or p is None else rows + p[:, :, None]

    def read(self, o: Tensor, q: Tensor | None, rows: Tensor | None, x: Tensor, w: Tensor | None) -> None:
        """`o += w exp(rows) (q x)`."""
        assert q is not None
        y = (q @ x).unflatten(-1, (self.repeat, -1))
        factor = _coefficient(rows, w)
        if factor is None:
            o.add_(y)
        else:
            o.addcmul_(y, factor[..., None])

    def read_dot(self, do: Tensor, q: Tensor | None, rows: Tensor | None, x: Tensor, w: Tensor | None) -> Tensor:
        """The product of `do` with what is read."""
        assert q is not None
        factor = _coefficient(rows, w)
        if factor is None:
            return dot(do.flatten(-2), q, x)
        if self.repeat == 1:  # one product serves the gradients of q and of the factor
            return dot(do.flatten(-2), q * factor, x)
        return dot((do * factor[..., None]).flatten(-2), q, x)


class _RowTransition:
    """What kinds with queries of their own per head have in common; `rows [M, n, r, K]` are the queries, R is 1."""

    def read(self, o: Tensor, q: Tensor | None, rows: Tensor, x: Tensor, w: Tensor | None) -> None:
        """`o += w (rows x)`."""
        y = (rows @ x)[..., None, :]
        if w is None:
            o.add_(y)
        else:
            o.addcmul_(y, w[..., None])

    def read_dot(self, do: Tensor, q: Tensor | None, rows: Tensor, x: Tensor, w: Tensor | None) -> Tensor:
        """The product of `do` with what is read."""
        return dot(do.squeeze(-2), rows if w is None else rows * w, x)


class DiagonalTransition(_RowTransition):
    """A factor per key channel, stored as its logarithm `p [M, n, K]`."""

    def push(self, p: Tensor, x: Tensor) -> Tensor:
        """`exp(p) x`, channel by channel."""
        return p.exp()[..., None] * x

    push_t = push

    def push_p_grad(self, p: Tensor, x: Tensor, dy: Tensor) -> Tensor:
        """Gradient of `push` with respect to `p`."""
        return (x * dy).sum(-1) * p.exp()

    def compose(self, right: Tensor, left: Tensor) -> Tensor:
        """Logarithms add."""
        return right + left

    def pull(self, rows: Tensor, p: Tensor) -> Tensor:
        """Queries take on the factor."""
        return rows * p.exp()[:, :, None]


class DenseTransition(_RowTransition):
    """A matrix `p [M, n, K, K]` that acts on states from the left."""

    def push(self, p: Tensor, x: Tensor) -> Tensor:
        """`p x`."""
        return p @ x

    def push_t(self, p: Tensor, x: Tensor) -> Tensor:
        """`p^T x`."""
        return p.mT @ x

    def push_p_grad(self, p: Tensor, x: Tensor, dy: Tensor) -> Tensor:
        """Gradient of `push` with respect to `p`."""
        return dy @ x.mT

    def compose(self, right: Tensor, left: Tensor) -> Tensor:
        """The product."""
        return right @ left

    def pull(self, rows: Tensor, p: Tensor) -> Tensor:
        """Queries (rows) times the matrix."""
        return rows @ p


def _coefficient(rows: Tensor | None, w: Tensor | None) -> Tensor | None:
    """`w exp(rows)`."""
    if rows is None or w is None:
        return w if rows is None else rows.exp()
    return rows.exp() * w
