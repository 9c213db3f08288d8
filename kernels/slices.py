"""Runs the operator on a CPU a few heads at a time, so that its working memory stays near the cache.

Heads and rows are independent. One after the other they need a fraction of the memory, and temporaries that fit the
allocator's arenas cost no page faults, which on long sequences take longer than the arithmetic. Other devices get
everything at once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import engine
from .engine import Operands
from .state import state_dtype

# Elements of the largest operand in one slice: 4 MiB in float32.
BUDGET = 1 << 20

# (rows, groups, heads) of one slice.
Slice = tuple[slice, slice, slice]


def forward(x: Operands, scale: float, return_final_state: bool) -> tuple[Tensor, Tensor]:
    """As `engine.forward`."""
    parts = list(_slices(x))
    if len(parts) <= 1:
        return engine.forward(x, scale, return_final_state)
    o, state = torch.empty(x.v.shape, dtype=x.v.dtype, device=x.v.device), None
    for rows, groups, heads in parts:
        o_part, s_part = engine.forward(_select(x, (rows, groups, heads)), scale, return_final_state)
        o[rows, :, heads] = o_part
        if return_final_state:
            state = s_part.new_empty(x.v.shape[0], x.v.shape[2], *s_part.shape[2:]) if state is None else state
            state[rows, heads] = s_part
    return o, o.new_empty(0, dtype=state_dtype(x.v.dtype)) if state is None else state


def backward(x: Operands, scale: float, grad_o: Tensor, grad_state: Tensor | None) -> list[Tensor | None]:
    """As `engine.backward`."""
    parts = list(_slices(x))
    if len(parts) <= 1:
        return engine.backward(x, scale, grad_o, grad_state)
    grads: list[Tensor | None] = [None] * 7
    for part in parts:
        rows, _, heads = part
        state = None if grad_state is None else grad_state[rows, heads]
        for i, grad in enumerate(engine.backward(_select(x, part), scale, grad_o[rows, :, heads], state)):
            if grad is not None:
                grads[i] = _put(grads[i], grad, x[i], _index(i, x, part))
    return grads


def _slices(x: Operands) -> Iterator[Slice]:
    batch, tokens, heads, value_dim = x.v.shape
    groups, key_dim = x.q.shape[2:]
    everything = (slice(0, batch), slice(0, groups), slice(0, heads))
    if x.v.device.type != "cpu" or x.v.numel() == 0 or x.q.numel() == 0:
        yield everything
        return
    ratio = heads // groups
    group_size = tokens * max(ratio * value_dim, key_dim)
    at_once = max(1, BUDGET // group_size)
    rows, columns = max(1, min(batch, at_once // groups)), min(groups, at_once)
    for b in range(0, batch, rows):
        for g in range(0, groups, columns):
            end = min(g + columns, groups)
            yield slice(b, b + rows), slice(g, end), slice(g * ratio, end * ratio)


def _index(position: int, x: Operands, part: Slice) -> tuple[slice, ...]:
    """Where a slice lies in the operand at a position of `Operands`."""
    rows, groups, heads = part
    if position in (0, 1):
        return rows, slice(None), groups
    if position == 6:
        return rows, heads
    if position == 4 and x.log_decay is not None and x.log_decay.dim() == 1:
        return (heads,)
    return rows, slice(None), heads


def _select(x: Operands, part: Slice) -> Operands:
    operands = [None if t is None else t[_index(i, x, part)] for i, t in enumerate(x[:7])]
    return Operands(*operands, None if x.lengths is None else x.lengths[part[0]])  # type: ignore[arg-type]


def _put(total: Tensor | None, grad: Tensor, like: Tensor | None, index: tuple[slice, ...]) -> Tensor:
    """Adds a slice's gradient to the whole one (a decay per head gets a part from every row)."""
    assert like is not None
    if total is None:
        total = torch.zeros(like.shape, dtype=grad.dtype, device=grad.device)
    total[index] += grad
    return total
