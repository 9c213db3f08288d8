"""What happens inside the chunks: the scores of their own tokens, and what the rest of the sequence needs to know.

One function for each structure; all chunks are done at once. What leaves a chunk:

* `scores`: by which its tokens see each other, weighed by level, levels `0 .. log2 C`;
* `rows` (and `q`, where heads share queries): queries that read the state at the chunk's start;
* `p`: the chunk's transition; `keys`, `values`: its contribution `keys^T values`, kept apart because the last
  chunk's tokens are needed one bucket at a time for the final state.

Shapes: `M` is `B * G` where heads share queries (then R heads per group) and `B * H` elsewhere (R = 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llcompile.kernels.aten.decay import ChannelDecay, NoDecay, ScalarDecay
from llcompile.kernels.aten.inverse import unit_lower_inverse
from llcompile.kernels.aten.pair_weights import spread
from llcompile.kernels.aten.transitions import DenseTransition, DiagonalTransition, ScalarTransition, Transition


class ChunkOperands(NamedTuple):
    """One call's operands on the chunk grid; w holds the levels inside a chunk only."""

    q: Tensor  # [B, G, 1, N, C, K]
    k: Tensor
    v: Tensor  # [B, G, R, N, C, V]
    w: Tensor | None  # [B, G, R, N, C, log2 C + 1]
    g: Tensor | None  # [B, G, R, N, C] or [B, G, R, N, C, K]
    beta: Tensor | None  # [B, G, R, N, C]


class Chunks(NamedTuple):
    """What leaves the chunks."""

    kind: Transition
    scores: Tensor  # [B, G, R or 1, N, C, C]
    rows: Any  # [M, N, C, R] log coefficients, or [M, N, C, K] queries, or None
    q: Tensor | None  # [M, N, C, K]
    p: Any  # [M, N, R] or [M, N, K] logarithms, [M, N, K, K] matrices, or None
    keys: Tensor  # [M, N, C, K]
    values: Tensor  # [M, N, C, R * V]


def inside(x: ChunkOperands) -> Chunks:
    """What leaves the chunks, by family; nothing else in this folder depends on the family."""
    if x.beta is not None:
        return _delta(x, x.beta)
    if x.g is not None and x.g.dim() == 6:
        return _channel(x, x.g)
    return _shared(x)


def _shared(x: ChunkOperands) -> Chunks:
    """No correction, and at most a factor per head: the heads of a group share queries, keys and GEMMs."""
    decay = _decay(x.g, (x.q,), x.k)
    rows = p = None
    if isinstance(decay, ScalarDecay):
        rows = _fold_heads(decay.from_start[..., None])[..., 0].clone()  # the tree overwrites rows
        p = decay.from_start[..., -1].movedim(2, 3).flatten(0, 1)  # [B * G, N, R]
    values = _fold_heads(decay.tail(x.v)).flatten(-2)
    kind = ScalarTransition(x.v.shape[2])
    return Chunks(kind, _weighed(decay.scores[0], x.w), rows, x.q.flatten(0, 2), p, x.k.flatten(0, 2), values)


def _channel(x: ChunkOperands, g: Tensor) -> Chunks:
    """No correction, a factor per key channel: queries and keys are per head once they are decayed."""
    decay = ChannelDecay(g, (x.q,), x.k)
    rows, p, keys = decay.head(x.q), decay.from_start[..., -1, :], decay.tail(x.k)
    rows, p, keys, values = (t.flatten(0, 2) for t in (rows, p, keys, x.v))
    return Chunks(DiagonalTransition(), _weighed(decay.scores[0], x.w), rows, None, p, keys, values)


def _delta(x: ChunkOperands, beta: Tensor) -> Chunks:
    """The delta rule, by the UT transform (arXiv 2406.06484): a chunk's transition is a dense matrix.

    With `B = (I + strict_tril(diag(beta) K K^T))^-1 diag(beta)`, decays inside the products, a chunk turns its values
    into `(Q K^T) B V`, adds `(B^T K)^T V` to the state and multiplies it by `decay - (B^T K)^T K`.
    """
    decay = _decay(x.g, (x.q, x.k), x.k)
    qk, kk = decay.scores
    mix = unit_lower_inverse(kk * beta[..., None]) * beta[..., None, :]  # B of the docstring
    scores = qk @ mix
    k_head = decay.head(x.k)
    rows = decay.head(x.q) - scores @ k_head
    keys = mix.mT @ decay.tail(x.k)
    if decay.total is None:
        diagonal = beta.new_ones(1)
    else:  # [B, G, R, N, 1 or K]
        diagonal = (decay.total[..., None] if decay.total.dim() == 4 else decay.total).exp()
    p = torch.diag_embed(diagonal.expand(*beta.shape[:-1], x.k.shape[-1])) - keys.mT @ k_head
    rows, p, keys, values = (t.flatten(0, 2) for t in (rows, p, keys, x.v))
    return Chunks(DenseTransition(), _weighed(scores, x.w), rows, None, p, keys, values)


def _decay(g: Tensor | None, rows: Sequence[Tensor], k: Tensor) -> NoDecay:
    """The decay inside chunks."""
    if g is None:
        return NoDecay(rows, k)
    return ScalarDecay(g, rows, k) if g.dim() == 5 else ChannelDecay(g, rows, k)


def _weighed(scores: Tensor, w: Tensor | None) -> Tensor:
    return scores if w is None else scores * spread(w)


def _fold_heads(x: Tensor) -> Tensor:
    """`[B, G, R, N, C, V] -> [B * G, N, C, R, V]`, contiguous (a view if R is 1)."""
    return x.movedim(2, 4).contiguous().flatten(0, 1)
