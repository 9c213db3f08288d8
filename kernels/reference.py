"""The definition of the operator: a plain float64 recurrence, one token at a time, differentiable by autograd.

It is slow and short on purpose: everything else in this folder is right when it agrees with this file. The steps are
those of the decode rule of log-linear attention (arXiv 2506.04761): merge, transition, write, read.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from llcompile.kernels.levels import trailing_zeros
from llcompile.kernels.state import is_level_state, linear_state, pack_state, unpack_state


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    level_weights: Tensor | None = None,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    decay_rate: Tensor | None = None,
    erase_query: Tensor | None = None,
    erase_key: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor | None]:
    """Log-linear attention by its recurrence; the signature of `llcompile.ops.loglinear_attention`.

    Args:
        q, k, erase_query, erase_key: `[B, T, G, K]`. v: `[B, T, H, V]`. level_weights: `[B, T, W, L]` or None.
        log_decay: `[B, T, H]`, `[B, T, H, K]` or `[H]`. decay_rate: `[H, K]`. beta: `[B, T, H]`.
        dtype: what to compute in; float64 is the definition, others measure what the formula loses in that dtype.

    Returns:
        `o [B, T, H, V]` and the final state (or None), both in `dtype`.
    """
    if log_decay is not None and log_decay.dim() == 1:
        log_decay = log_decay.expand(*v.shape[:3])
    given = (q, k, v, level_weights, log_decay, decay_rate, beta, erase_query, erase_key)
    q_, k_, v_, w, g, rate, *others_ = (x if x is None else x.to(dtype) for x in given)
    if rate is not None and g is not None:
        g = g[..., None] * rate
    if w is not None:
        w = w.repeat_interleave(v.shape[2] // w.shape[2], 2)
    operands = (q_, k_, v_, w, g, *others_)
    state = None if initial_state is None else initial_state.to(dtype)
    out = torch.zeros_like(v, dtype=dtype)
    finals = []
    for number, (row, tokens) in enumerate(sequences(v, cu_seqlens, attention_mask)):
        q_row, k_row, v_row, *others = [x if x is None else x[row, tokens] for x in operands]
        assert q_row is not None
        assert k_row is not None
        assert v_row is not None
        start = None if state is None else state[number : number + 1]
        o, final = _sequence(q_row, k_row, v_row, *others, scale=scale, initial_state=start)
        out = out.index_put((torch.full_like(tokens, row), tokens), o)
        finals.append(final)
    if not return_final_state:
        return out, None
    if finals:
        return out, torch.cat(finals)
    levels = () if level_weights is None else (1 + level_weights.shape[-1],)
    return out, out.new_zeros(0, v.shape[2], *levels, q.shape[-1], v.shape[-1])


def sequences(v: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None) -> list[tuple[int, Tensor]]:
    """`(row, token indices)` of every sequence in the batch."""
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        return [(0, torch.arange(a, b, device=v.device)) for a, b in itertools.pairwise(bounds)]
    if mask is not None:
        return [(row, mask[row].nonzero()[:, 0]) for row in range(v.shape[0])]
    return [(row, torch.arange(v.shape[1], device=v.device)) for row in range(v.shape[0])]


def _sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor | None,
    g: Tensor | None,
    beta: Tensor | None,
    erase_query: Tensor | None,
    erase_key: Tensor | None,
    *,
    scale: float,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One sequence: operands `[T, ...]`, state `[1, ...]` -> `o [T, H, V]` and the final state `[1, ...]`."""
    length, heads, value_dim = v.shape
    repeat, key_dim = heads // q.shape[1], q.shape[2]
    q, k = q.repeat_interleave(repeat, 1), k.repeat_interleave(repeat, 1)  # [T, H, K]
    erase = [x if x is None else x.repeat_interleave(repeat, 1) for x in (erase_query, erase_key)]
    levels = 1 if w is None else w.shape[-1]
    position = 0
    states = v.new_zeros(heads, levels, key_dim, value_dim)
    if initial_state is not None and w is not None and is_level_state(initial_state):
        unpacked, positions = unpack_state(initial_state)
        states, position = unpacked[0], int(positions[0])
    elif initial_state is not None:  # a linear state is one bucket of the last level; positions count from 0
        states = torch.cat([states[:, 1:] * 0, linear_state(initial_state)[0][:, None]], 1)
    outputs = []
    for t in range(length):
        decay = None if g is None else g[t].exp()
        others = (None if x is None else x[t] for x in (beta, *erase))
        states = recurrence_step(states, position + t, k[t], v[t], decay, *others)
        weights = v.new_ones(heads, 1) if w is None else w[t]
        outputs.append(scale * torch.einsum("hl,hk,hlkv->hv", weights, q[t], states))
    out = torch.stack(outputs) if outputs else v[:0]
    if w is None:
        return out, states[:, 0][None]
    return out, pack_state(states[None], torch.tensor([position + length], device=v.device))


def recurrence_step(
    states: Tensor,
    position: int,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    erase_query: Tensor | None,
    erase_key: Tensor | None,
) -> Tensor:
    """Steps 1 to 3 of decoding: level states `[H, L, K, V]` before a token -> after it.

    k, erase_query, erase_key: `[H, K]`, v: `[H, V]`, decay: `[H]` or `[H, K]` (not its logarithm), beta: `[H]`.
    """
    last = states.shape[1] - 1
    if position > 0:  # 1. merge: every level below the one that fills up empties into it
        j = min(trailing_zeros(position) + 1, last)
        merged = states[:, : j + 1].sum(1, keepdim=True)
        states = torch.cat([torch.zeros_like(states[:, :j]), merged, states[:, j + 1 :]], 1)
    old = states
    if decay is not None:  # 2. the transition acts on every level: decay first, then the correction
        states = states * decay.reshape(decay.shape[0], 1, -1, 1)
    write = k[:, :, None] * v[:, None, :]
    if erase_query is not None and erase_key is not None:  # reads what was there before the decay
        seen = torch.einsum("hk,hlkv->hlv", erase_query, old)
        erase_key = erase_key if beta is None else beta[:, None] * erase_key
        states = states - erase_key[:, None, :, None] * seen[:, :, None, :]
    elif beta is not None:
        seen = torch.einsum("hk,hlkv->hlv", k, states)
        states = states - beta[:, None, None, None] * k[:, None, :, None] * seen[:, :, None, :]
        write = beta[:, None, None] * write
    first = states[:, 0] + write  # 3. level 0 was emptied by the merge, unless it is the only level
    return torch.cat([first[:, None], states[:, 1:]], 1)
