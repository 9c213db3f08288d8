"""The parallel form `O = (P . M_H) V`: scores of all pairs, and nothing but plain functional ATen operations.

It costs T squared and runs nowhere in training or serving. Other compilers are given it, who know ATen and not our
operators (MLIR). Source: arXiv 2506.04761, sections 3.2 and 3.3; P of the delta rule is that after its UT transform.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llcompile.kernels.levels import level_table
from llcompile.kernels.operands import Operands
from llcompile.kernels.state import state_dtype


def parallel_attention(x: Operands, scale: float) -> Tensor:
    """Log-linear attention without states.

    Returns:
        `o [B, T, H, V]` in the dtype of `v`, computed in float32, or in float64 where `v` is.
    """
    x = x.with_weights_per_head()
    v, level_weights, log_decay, rate, beta = x.v, x.level_weights, x.log_decay, x.decay_rate, x.beta
    dtype = state_dtype(v.dtype)
    heads, length = v.shape[2], v.shape[1]
    if log_decay is not None and log_decay.dim() == 1:
        log_decay = log_decay.expand(*v.shape[:3])
    if log_decay is not None and rate is not None:
        log_decay = log_decay[..., None] * rate
    q, k = (_of_heads(t.to(dtype), heads) for t in (x.q, x.k))  # [B, H, T, K]
    decays = None if log_decay is None else _decays(log_decay.to(dtype))
    t = torch.arange(length, device=v.device)
    p = _masked(_scores(q, k, decays) * scale, t[:, None] >= t)  # [B, H, T, T]
    write = None if beta is None else beta.to(dtype).transpose(1, 2)  # [B, H, T]
    if x.erase_query is not None and x.erase_key is not None:
        query, key = (_of_heads(t.to(dtype), heads) for t in (x.erase_query, x.erase_key))
        key = key if write is None else key * write[..., None]
        lost = _masked(_scores(q, key, decays) * scale, t[:, None] >= t)
        seen, removed = (_before(_masked(_scores(_sooner(query), k_, decays), t[:, None] >= t)) for k_ in (k, key))
        p = p - lost @ _inverse_plus_one(removed) @ seen
    elif write is not None:
        erased = _masked(_scores(k, k, decays) * write[..., None], t[:, None] > t)
        p = p @ _inverse_plus_one(erased) * write[..., None, :]
    if level_weights is not None:
        p = p * _mask_of_levels(level_weights.to(dtype))
    o = p @ v.to(dtype).transpose(1, 2)
    return o.transpose(1, 2).to(v.dtype)


def _of_heads(x: Tensor, heads: int) -> Tensor:
    """`[B, T, G, K]` as `[B, H, T, K]`."""
    x = x.transpose(1, 2)
    return x[:, :, None].expand(-1, -1, heads // x.shape[1], -1, -1).flatten(1, 2)


def _decays(log_decay: Tensor) -> Tensor:
    """The factor from each token `s` to each `t`, `[B, H, T, T]` or `[B, H, T, T, K]`; 1 where `s >= t`.

    Sums run from `s` itself: a difference of two sums from the start would lose what is small against them.
    """
    g = log_decay.transpose(1, 2)  # [B, H, T] or [B, H, T, K]
    t = torch.arange(g.shape[2], device=g.device)
    later = t[:, None] > t
    later = later if g.dim() == 3 else later[..., None]
    return _running_sum(_masked(g.unsqueeze(3), later)).exp()


def _running_sum(x: Tensor) -> Tensor:
    """The cumulative sum over axis 2, by doubling: cumsum itself is a dialect of its own in torch-mlir."""
    reach = 1
    while reach < x.shape[2]:
        earlier = x.narrow(2, 0, x.shape[2] - reach)
        x = x + torch.cat([torch.zeros_like(x.narrow(2, 0, reach)), earlier], 2)
        reach *= 2
    return x


def _scores(q: Tensor, k: Tensor, decays: Tensor | None) -> Tensor:
    if decays is None or decays.dim() == 4:
        scores = q @ k.transpose(-1, -2)
        return scores if decays is None else scores * decays
    return (q[:, :, :, None] * k[:, :, None] * decays).sum(-1)


def _sooner(rows: Tensor) -> Tensor:
    """Each row one token sooner: a row that reads before its token's decay is the next one of the token before."""
    return torch.cat([rows.narrow(2, 1, rows.shape[2] - 1), torch.zeros_like(rows.narrow(2, 0, 1))], 2)


def _before(scores: Tensor) -> Tensor:
    """Scores `[B, H, T, T]` of such rows at their own token."""
    return torch.cat([torch.zeros_like(scores.narrow(2, 0, 1)), scores.narrow(2, 0, scores.shape[2] - 1)], 2)


def _masked(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))


def _inverse_plus_one(lower: Tensor) -> Tensor:
    """`(1 + N)^-1` for strictly lower triangular N `[..., T, T]`: the product of `1 + (-N)^(2^i)`."""
    length = lower.shape[-1]
    t = torch.arange(length, device=lower.device)
    one = (t[:, None] == t).to(lower.dtype)
    power = -lower
    inverse = one + power
    for _ in range(max(length - 1, 0).bit_length() - 1):
        power = power @ power
        inverse = inverse @ (one + power)
    return inverse


def _mask_of_levels(w: Tensor) -> Tensor:
    """M_H `[B, H, T, T]` from `[B, T, H, L]`; the last level serves all above it."""
    batch, length, heads, levels = w.shape
    index = level_table(length, w.device).clamp(max=levels - 1)
    return w.transpose(1, 2).gather(3, index.expand(batch, heads, length, length))
