"""Reading tokens of a state and of the tokens since, which are not in it yet."""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import torch
from torch import Tensor

from llcompile.kernels.levels import bucket_start, level, trailing_zeros
from llcompile.kernels.operands import Operands
from llcompile.kernels.state import is_level_state, position_of


class Base(NamedTuple):
    """The state that tokens are replayed on, and what is known of it on the host.

    Args:
        state: `[B, H, K, V]` or `[B, H, 1 + L, K, V]`.
        positions: of the rows; empty for a linear state.
        held: the levels of each row that hold something.
        occupied: the same as `[B, L]` float32, 1 or 0, on the state's device; None for a linear state.
    """

    state: Tensor
    positions: tuple[int, ...] = ()
    held: tuple[frozenset[int], ...] = ()
    occupied: Tensor | None = None


def first_base(state: Tensor) -> Base:
    """Take any state, whose values are waited for; a level state is changed in place."""
    if not is_level_state(state):
        return Base(state)
    filled = state[:, :, 1:].ne(0).flatten(3).any(3).any(1)
    held = [{i for i, some in enumerate(row) if some} for row in filled.tolist()]
    return _merged(state, position_of(state).tolist(), held)


def next_base(base: Base, state: Tensor, tokens: int) -> Base:
    """Take the state, `tokens` further, that an operator made of `base`; it is changed in place, nothing waits."""
    if not base.positions:
        return Base(state)
    last, held = state.shape[2] - 2, []
    for position, before in zip(base.positions, base.held, strict=True):
        end = position + tokens - 1  # the last query, whose levels these are
        old = {min(max(level(end, bucket_start(position, i)), i), last) for i in before}
        held.append(old | {min(level(end, s), last) for s in range(position, position + tokens)})
    return _merged(state, [position + tokens for position in base.positions], held)


def _merged(state: Tensor, positions: list[int], held: list[set[int]]) -> Base:
    """With those levels merged that the next tokens see as one (`state.merge`); others are not touched."""
    last = state.shape[2] - 2
    rows_by_level: dict[int, list[int]] = defaultdict(list)
    for row, position in enumerate(positions):
        rows_by_level[min(trailing_zeros(position) + 1, last)].append(row)
    for full, rows in rows_by_level.items():
        if not full:
            continue
        whole = state if len(rows) == len(positions) else state[rows]
        whole[:, :, 1 + full] += whole[:, :, 1 : 1 + full].sum(2)
        whole[:, :, 1 : 1 + full] = 0
        if whole is not state:
            state[rows] = whole
        for row in rows:
            held[row] = {i for i in held[row] if i > full} | ({full} if any(i <= full for i in held[row]) else set())
    occupied = torch.tensor([[i in row for i in range(last + 1)] for row in held], dtype=torch.float32)
    return Base(state, tuple(positions), tuple(map(frozenset, held)), occupied.to(state.device))


def with_silent_queries(x: Operands) -> Operands:
    """As the operator takes them: queries and level weights of the last `T` of `n` tokens, with 0 before them."""
    missing = x.v.shape[1] - x.q.shape[1]

    def silent(t: Tensor) -> Tensor:
        return torch.cat([t.new_zeros(t.shape[0], missing, *t.shape[2:]), t], 1)

    weights = None if x.level_weights is None else silent(x.level_weights)
    return x._replace(q=silent(x.q), level_weights=weights)
