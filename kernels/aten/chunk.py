"""What happens inside the chunks: the scores of their own tokens, and what the rest of the sequence needs to know.

All chunks are done at once. `M` is `B * H`, with `H = G * R` where R heads share a query and a key.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llcompile.kernels.aten.decay import Decay
from llcompile.kernels.aten.transitions import Dense, Diagonal, Transition
from llcompile.kernels.levels import level_table


class ChunkOperands(NamedTuple):
    """One call's operands on the chunk grid; w holds the levels inside a chunk only."""

    q: Tensor  # [B, G, 1, N, C, K]
    k: Tensor
    v: Tensor  # [B, G, R, N, C, V]
    w: Tensor | None  # [B, G, R, N, C, log2 C + 1]
    g: Tensor  # [B, G, R, N, C, 1 or K]
    beta: Tensor | None  # [B, G, R, N, C]
    erase_query: Tensor | None  # [B, G, 1, N, C, K]
    erase_key: Tensor | None


class Chunks(NamedTuple):
    """What leaves the chunks."""

    kind: Transition
    o: Tensor  # [M, N, C, V] what tokens read in their own chunk
    rows: Tensor  # [M, N, C, K] queries that read the state at the chunk's start
    p: Tensor  # [M, N, 1 or K] logarithms or [M, N, K, K] matrices: the chunk's transition
    keys: Tensor  # [M, N, C, K] the chunk adds keys^T values; apart, as the end of a row needs one bucket at a time
    values: Tensor  # [M, N, C, V]


def inside(x: ChunkOperands) -> Chunks:
    """What leaves the chunks; nothing else in this folder depends on the family."""
    decay = Decay(x.g)
    scores, rows, keys = decay.scores(x.q, x.k), x.q * decay.from_start, x.k * decay.to_end
    kind: Transition = Diagonal()
    p = decay.total
    if x.erase_query is not None and x.erase_key is not None:
        kind = Dense()
        erase_key = x.erase_key if x.beta is None else x.erase_key * x.beta[..., None]
        scores, rows, p, keys = _erased(x, x.erase_query, erase_key, decay, scores, rows, keys)
    elif x.beta is not None:
        kind = Dense()
        scores, rows, p, keys = _corrected(x, x.beta, decay, scores, rows, keys)
    if x.w is not None:
        pairs = level_table(x.w.shape[-2], x.w.device).expand(*x.w.shape[:-1], -1)
        scores = scores * x.w.gather(-1, pairs)
    return Chunks(kind, *(t.flatten(0, 2) for t in (scores @ x.v, rows, p, keys, x.v)))


def _corrected(
    x: ChunkOperands, beta: Tensor, decay: Decay, qk: Tensor, rows: Tensor, keys: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The delta rule, by the UT transform (arXiv 2406.06484): a chunk's transition is a dense matrix.

    With `B = (I + strict_tril(diag(beta) K K^T))^-1 diag(beta)`, decays inside the products, a chunk turns its values
    into `(Q K^T) B V`, adds `(B^T K)^T V` to the state and multiplies it by `decay - (B^T K)^T K`.
    """
    kk = decay.scores(x.k, x.k) * beta[..., None]  # its diagonal is taken for 1
    eye = torch.eye(kk.shape[-1], dtype=kk.dtype, device=kk.device).expand(kk.shape)
    mix = torch.linalg.solve_triangular(kk, eye, upper=False, unitriangular=True) * beta[..., None, :]
    scores = qk @ mix
    k_head = x.k * decay.from_start
    keys = mix.mT @ keys
    return scores, rows - scores @ k_head, _decayed_identity(x, decay) - keys.mT @ k_head, keys


def _erased(
    x: ChunkOperands, query: Tensor, key: Tensor, decay: Decay, qk: Tensor, rows: Tensor, keys: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """An erase key of its own: what a token removes, `u_t = query_t^T S_{t-1}`, solves a triangular system, too.

    With `A(x, y)` the products of tokens t and s < t, decayed from s to before t, `u = (I + A(query, key))^-1
    (query S + A(query, k) V)`; a chunk writes `k V - key u`, and reads likewise. `[..., N, C, K]` each; source: the
    chunk form of RWKV-7 (arXiv 2503.14456, appendix) in the notation of the delta rule's UT transform.
    """
    seen, removed, old = decay.scores_before(query, x.k), decay.scores_before(query, key), query * decay.before
    solve = torch.linalg.solve_triangular  # the diagonal is taken for 1
    lost = solve(removed, decay.scores(x.q, key), upper=False, unitriangular=True, left=False)
    tail = solve(removed.mT, key * decay.to_end, upper=True, unitriangular=True)
    scores, rows, keys = qk - lost @ seen, rows - lost @ old, keys - seen.mT @ tail
    return scores, rows, _decayed_identity(x, decay) - tail.mT @ old, keys


def _decayed_identity(x: ChunkOperands, decay: Decay) -> Tensor:
    """What whole chunks' decay does to a state, as a matrix `[..., N, K, K]`."""
    return torch.diag_embed(decay.total.exp().expand(*decay.total.shape[:-1], x.k.shape[-1]))
