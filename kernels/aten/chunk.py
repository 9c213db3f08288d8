"""What happens inside the chunks: their own output, and what the rest of the sequence needs to know of them.

Three stages, one for each structure; all chunks are done at once. Each has ``forward() -> ChunkResult`` and
``backward(ChunkGradient) -> OperandGradients``, which needs a forward pass before it, if one without ``output`` (then
``o`` holds anything and must not be written). What leaves a chunk:

* ``o``: the output from tokens of the same chunk, levels ``0 .. log2 C``;
* ``rows`` (and ``q``, where heads share queries): queries that read the state at the chunk's start;
* ``p``: the chunk's transition; ``keys``, ``values``: its contribution ``keys^T values``, kept apart because the last
  chunk's tokens are needed one bucket at a time for the final state.

Shapes: ``M`` is ``B * G`` where heads share queries (then R heads per group) and ``B * H`` elsewhere (R = 1).
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from llcompile.kernels.aten.decay import ChannelDecay, ChunkDecay, NoDecay, ScalarDecay
from llcompile.kernels.aten.inverse import unit_lower_inverse
from llcompile.kernels.aten.pair_weights import gather_back, spread
from llcompile.kernels.aten.transitions import DenseTransition, DiagonalTransition, ScalarTransition, Transition


class ChunkOperands(NamedTuple):
    """One call's operands on the chunk grid; w holds the levels inside a chunk only."""

    q: Tensor  # [B, G, 1, N, C, K]
    k: Tensor
    v: Tensor  # [B, G, R, N, C, V]
    w: Tensor | None  # [B, G, R, N, C, log2 C + 1]
    g: Tensor | None  # [B, G, R, N, C] or [B, G, R, N, C, K]
    beta: Tensor | None  # [B, G, R, N, C]


class ChunkResult(NamedTuple):
    """What leaves the chunks."""

    o: Tensor  # [M, N, C, R, V]
    rows: Any  # [M, N, C, R] log coefficients, or [M, N, C, K] queries, or None
    q: Tensor | None  # [M, N, C, K]
    p: Any  # [M, N, R] or [M, N, K] logarithms, [M, N, K, K] matrices, or None
    keys: Tensor  # [M, N, C, K]
    values: Tensor  # [M, N, C, R * V]


class ChunkGradient(NamedTuple):
    """Gradients of a :class:`ChunkResult`, field by field."""

    o: Tensor
    rows: Any
    q: Tensor | None
    p: Any
    keys: Any
    values: Any


class OperandGradients(NamedTuple):
    """Gradients of :class:`ChunkOperands`, field by field."""

    q: Tensor
    k: Tensor
    v: Tensor
    w: Tensor | None
    g: Tensor | None
    beta: Tensor | None


class Stage(Protocol):
    """One structure of mixer inside chunks."""

    kind: Transition

    def forward(self, output: bool = True) -> ChunkResult: ...  # noqa: D102
    def backward(self, d: ChunkGradient) -> OperandGradients: ...  # noqa: D102


def make_stage(x: ChunkOperands) -> Stage:
    """The stage for these operands; nothing else in this folder asks which family it is."""
    if x.beta is not None:
        return DeltaStage(x)
    if x.g is not None and x.g.dim() == 6:
        return ChannelStage(x)
    return SharedStage(x)


def make_decay(g: Tensor | None) -> ChunkDecay:
    """The decay inside chunks."""
    if g is None:
        return NoDecay()
    return ScalarDecay(g) if g.dim() == 5 else ChannelDecay(g)


class SharedStage:
    """No correction, and at most a factor per head: the heads of a group share queries, keys and GEMMs."""

    def __init__(self, x: ChunkOperands) -> None:
        self.x, self.decay = x, make_decay(x.g)
        self.kind: Transition = ScalarTransition(x.v.shape[2])

    def forward(self, output: bool = True) -> ChunkResult:
        """See the module."""
        x = self.x
        (self.scores,) = self.decay.scores((x.q,), x.k)
        self.spread = None if x.w is None else spread(x.w, x.v.shape[4])
        o = _output(self.scores, self.spread, x.v) if output else x.v
        self.tail = self.decay.tail(x.v)
        rows = p = None
        if isinstance(self.decay, ScalarDecay):
            rows = _fold_heads(self.decay.from_start[..., None])[..., 0].clone()  # the tree overwrites rows
            p = _nodes(self.decay.total())
        return ChunkResult(
            _fold_heads(o) if output else o,
            rows,
            x.q.flatten(0, 2),
            p,
            x.k.flatten(0, 2),
            _fold_heads(self.tail).flatten(-2),
        )

    def backward(self, d: ChunkGradient) -> OperandGradients:
        """See the module."""
        x, repeat = self.x, self.x.v.shape[2]
        do = _unfold_heads(d.o, x.v.shape)
        dv = (self.scores if self.spread is None else self.scores * self.spread).mT @ do
        dscores = do @ x.v.mT
        dw = None
        if self.spread is not None:
            dw = gather_back(dscores * self.scores)
            dscores.mul_(self.spread)
        (dq,), dk = self.decay.scores_grad((x.q,), x.k, (self.scores,), (dscores,))
        dtail = _unfold_heads(d.values.unflatten(-1, (repeat, -1)), x.v.shape)
        dg = None
        if isinstance(self.decay, ScalarDecay):
            dv += self._tail_grad(dtail)
            self.decay.start_grad(_unfold_heads(d.rows[..., None], (*x.v.shape[:-1], 1))[..., 0])
            self.decay.total_grad(d.p.unflatten(0, x.v.shape[:2]).movedim(-1, 2))
            dg = self.decay.gradient()
        else:
            dv += dtail
        assert d.q is not None
        return OperandGradients(dq + d.q.view(x.q.shape), dk + d.keys.view(x.k.shape), dv, dw, dg, None)

    def _tail_grad(self, dtail: Tensor) -> Tensor:
        """Like decay.tail_grad, but values belong to heads, so nothing is folded."""
        assert isinstance(self.decay, ScalarDecay)
        self.decay._collect("end", (self.tail * dtail).sum(-1))
        return dtail * self.decay.to_end.exp()[..., None]


class ChannelStage:
    """No correction, a factor per key channel: queries and keys are per head once they are decayed."""

    def __init__(self, x: ChunkOperands) -> None:
        self.x, self.decay = x, make_decay(x.g)
        self.kind: Transition = DiagonalTransition()

    def forward(self, output: bool = True) -> ChunkResult:
        """See the module."""
        x = self.x
        (self.scores,) = self.decay.scores((x.q,), x.k)
        self.spread = None if x.w is None else spread(x.w, x.v.shape[4])
        o = _output(self.scores, self.spread, x.v) if output else x.v
        head, self.tail = self.decay.head(x.q), self.decay.tail(x.k)
        total = self.decay.total()
        assert total is not None
        return ChunkResult(
            o.flatten(0, 2)[..., None, :],
            head.flatten(0, 2),
            None,
            total.flatten(0, 2),
            self.tail.flatten(0, 2),
            x.v.flatten(0, 2),
        )

    def backward(self, d: ChunkGradient) -> OperandGradients:
        """See the module."""
        x = self.x
        do = d.o.squeeze(-2).view(x.v.shape)
        dv = (self.scores if self.spread is None else self.scores * self.spread).mT @ do
        dscores = do @ x.v.mT
        dw = None
        if self.spread is not None:
            dw = gather_back(dscores * self.scores)
            dscores.mul_(self.spread)
        (dq,), dk = self.decay.scores_grad((x.q,), x.k, (self.scores,), (dscores,))
        head = self.decay.head(x.q)  # made again: the tree overwrote the one that left as rows
        dq += self.decay.head_grad(head, d.rows.view(head.shape))
        dk += self.decay.tail_grad(self.tail, d.keys.view(self.tail.shape))
        self.decay.total_grad(d.p.view(*x.v.shape[:4], -1))
        return OperandGradients(dq, dk, dv + d.values.view(x.v.shape), dw, self.decay.gradient(), None)


class DeltaStage:
    """The delta rule, by the UT transform (arXiv 2406.06484): a chunk's transition is a dense matrix.

    With ``B = (I + strict_tril(diag(beta) K K^T))^-1 diag(beta)``, decays inside the products, a chunk turns its values
    into ``(Q K^T) B V``, adds ``(B^T K)^T V`` to the state and multiplies it by ``decay - (B^T K)^T K``.
    """

    def __init__(self, x: ChunkOperands) -> None:
        self.x, self.decay = x, make_decay(x.g)
        self.kind: Transition = DenseTransition()

    def forward(self, output: bool = True) -> ChunkResult:
        """See the module."""
        x = self.x
        assert x.beta is not None
        self.qk, self.kk = self.decay.scores((x.q, x.k), x.k)
        self.inverse = unit_lower_inverse(self.kk * x.beta[..., None])
        self.mix = self.inverse * x.beta[..., None, :]  # B of the docstring
        self.final_scores = self.qk @ self.mix
        self.spread = None if x.w is None else spread(x.w, x.v.shape[4])
        o = _output(self.final_scores, self.spread, x.v) if output else x.v
        self.q_head, self.k_head, self.k_tail = self.decay.head(x.q), self.decay.head(x.k), self.decay.tail(x.k)
        rows = self.q_head - self.final_scores @ self.k_head
        self.keys = self.mix.mT @ self.k_tail
        p = -(self.keys.mT @ self.k_head)
        self.diagonal = self._diagonal(p)
        p.diagonal(dim1=-2, dim2=-1).add_(self.diagonal)
        return ChunkResult(
            o.flatten(0, 2)[..., None, :],
            rows.flatten(0, 2),
            None,
            p.flatten(0, 2),
            self.keys.flatten(0, 2),
            x.v.flatten(0, 2),
        )

    def _diagonal(self, p: Tensor) -> Tensor:
        """The chunk's decay, ``[B, G, R, N, 1 or K]``."""
        total = self.decay.total()
        if total is None:
            return p.new_ones(*p.shape[:-2], 1)
        return (total[..., None] if total.dim() == 4 else total).exp()

    def backward(self, d: ChunkGradient) -> OperandGradients:
        """See the module."""
        x = self.x
        assert x.beta is not None
        do, drows = d.o.squeeze(-2).view(x.v.shape), d.rows.view(*x.v.shape[:-1], -1)
        dkeys, dp = d.keys.view(*x.v.shape[:-1], -1), d.p.view(*x.v.shape[:4], *d.p.shape[-2:])
        dv = (self.final_scores if self.spread is None else self.final_scores * self.spread).mT @ do
        dfinal = do @ x.v.mT
        dw = None
        if self.spread is not None:
            dw = gather_back(dfinal * self.final_scores)
            dfinal.mul_(self.spread)
        dfinal -= drows @ self.k_head.mT
        dk_head = -(self.final_scores.mT @ drows) - self.keys @ dp
        dkeys = dkeys - self.k_head @ dp.mT
        self._diagonal_grad(dp)
        dmix = self.qk.mT @ dfinal + self.k_tail @ dkeys.mT
        dqk = (dfinal @ self.mix.mT).tril_()
        dkk, dbeta = self._mix_grad(dmix)
        (dq, dk_row), dk = self.decay.scores_grad((x.q, x.k), x.k, (self.qk, self.kk), (dqk, dkk))
        dq = dq + self.decay.head_grad(self.q_head, drows)
        dk = dk + dk_row + self.decay.head_grad(self.k_head, dk_head)
        dk += self.decay.tail_grad(self.k_tail, self.mix @ dkeys)
        dg = self.decay.gradient()
        return OperandGradients(dq, dk, dv + d.values.view(x.v.shape), dw, dg, dbeta)

    def _diagonal_grad(self, dp: Tensor) -> None:
        total = self.decay.total()
        if total is not None:
            d = dp.diagonal(dim1=-2, dim2=-1) * self.diagonal
            self.decay.total_grad(d.sum(-1) if total.dim() == 4 else d)

    def _mix_grad(self, dmix: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the inverse: of the scores of keys among themselves, and of beta."""
        beta = self.x.beta
        assert beta is not None
        dbeta = (dmix * self.inverse).sum(-2)
        dinverse = dmix * beta[..., None, :]
        dlower = (self.inverse.mT @ dinverse @ self.inverse.mT).neg_().tril_(-1)
        dbeta += (dlower * self.kk).sum(-1)
        return dlower.mul_(beta[..., None]), dbeta


def _output(scores: Tensor, weights: Tensor | None, v: Tensor) -> Tensor:
    return (scores if weights is None else scores * weights) @ v


def _fold_heads(x: Tensor) -> Tensor:
    """``[B, G, R, N, C, V] -> [B * G, N, C, R, V]``, contiguous (a view if R is 1)."""
    return x.movedim(2, 4).contiguous().flatten(0, 1)


def _unfold_heads(x: Tensor, shape: Any) -> Tensor:
    """``[B * G, N, C, R, V] -> [B, G, R, N, C, V]``."""
    return x.unflatten(0, shape[:2]).movedim(4, 2)


def _nodes(total: Tensor) -> Tensor:
    """``[B, G, R, N] -> [B * G, N, R]``."""
    return total.movedim(2, 3).flatten(0, 1)
