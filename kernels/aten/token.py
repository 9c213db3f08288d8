"""One decoded token: the recurrence of arXiv 2506.04761 on a batch of states, without a loop and without a sync."""

from __future__ import annotations

import torch
from torch import Tensor

from llcompile.kernels.operands import Token
from llcompile.kernels.state import in_levels, merge, pack_state, state_dtype, unpack_state


def step(token: Token) -> tuple[Tensor, Tensor]:
    """Absorb one token and read out.

    Returns:
        `o [B, H, V]` in the dtype of `v` and the new state, of the kind that the level weights ask for.
    """
    q, k, v, w, state, log_decay, rate, beta, erase_query, erase_key, scale = token
    dtype = state_dtype(v.dtype)
    qf, kf, vf = q.to(dtype), k.to(dtype), v.to(dtype)
    state, position = in_levels(state.to(dtype), None if w is None else w.shape[-1]), None
    if w is None:
        states = state[:, :, None]  # [B, H, 1, K, V]
    else:
        states, position = unpack_state(state)  # [B, H, L, K, V]
        states = merge(states, position)
    old = states
    if log_decay is not None:
        states = states * _decay(log_decay.to(dtype), rate, v)
    batch, heads = v.shape[:2]
    repeat = heads // max(q.shape[1], 1)
    grouped = (batch, q.shape[1], repeat, *states.shape[2:])  # [B, G, R, L, K, V]: heads by their q, k group
    q_row = qf[:, :, None, None, None, :]
    write = (kf[:, :, None, :, None] * vf.reshape(batch, -1, repeat, 1, v.shape[-1])).reshape(
        batch, heads, *states.shape[3:]
    )
    if beta is not None or erase_key is not None:
        bf = v.new_ones(1, dtype=dtype) if beta is None else beta.to(dtype)[:, :, None, None]
        looked, reader, place = (states, kf, kf)
        if erase_query is not None and erase_key is not None:  # it reads what was there before the decay
            looked, reader, place = old, erase_query.to(dtype), erase_key.to(dtype)
        seen = (reader[:, :, None, None, None, :] @ looked.reshape(grouped)).reshape(batch, heads, -1, v.shape[-1])
        erase = (bf * seen).reshape(*grouped[:4], 1, v.shape[-1])  # [B, G, R, L, 1, V]
        states = states - (place[:, :, None, None, :, None] * erase).reshape(states.shape)
        write = write if erase_key is not None else bf * write
    first = states[:, :, 0] + write
    states = torch.cat([first[:, :, None], states[:, :, 1:]], 2)
    read = (q_row @ states.reshape(grouped)).reshape(batch, heads, -1, v.shape[-1])  # [B, H, L, V]
    o = read[:, :, 0] if w is None else (w.to(dtype)[..., None] * read).sum(2)
    new_state = states[:, :, 0].contiguous() if position is None else pack_state(states, position + 1)
    return (o * scale).to(v.dtype, copy=True), new_state


def _decay(log_decay: Tensor, rate: Tensor | None, v: Tensor) -> Tensor:
    """The decay as a factor of `[B, H, L, K, V]`."""
    if log_decay.dim() == 1:
        log_decay = log_decay.expand(v.shape[:2])
    decay = (log_decay if rate is None else log_decay[..., None] * rate).exp()
    return decay.reshape(*v.shape[:2], 1, -1, 1)
