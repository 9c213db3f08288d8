"""Reading tokens of a state and of the tokens since, which are not in it yet."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Set
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
    """Take the state, `tokens` further, that was made of `base`, with the levels that the next token sees."""
    if not base.positions:
        return Base(state)
    last, positions = state.shape[2] - 2, tuple(position + tokens for position in base.positions)
    held = []
    for position, end, before in zip(base.positions, positions, base.held, strict=True):
        old = {min(max(level(end, bucket_start(position, i)), i), last) for i in before}
        held.append(frozenset(old | {min(level(end, s), last) for s in range(position, end)}))
    return Base(state, positions, tuple(held), _occupied(held, state))


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
    return Base(state, tuple(positions), tuple(map(frozenset, held)), _occupied(held, state))


def _occupied(held: Iterable[Set[int]], state: Tensor) -> Tensor:
    """As `Base` has it, of levels `held` in each row."""
    levels = range(state.shape[2] - 1)
    return torch.tensor([[i in row for i in levels] for row in held], dtype=torch.float32).to(state.device)


def without_queries(x: Operands) -> Operands:
    """The same tokens, none of which is read."""
    weights = None if x.level_weights is None else x.level_weights[:, :0]
    return x._replace(q=x.q[:, :0], level_weights=weights)


def with_silent_queries(x: Operands) -> Operands:
    """As the operator takes them: queries and level weights of the last `T` of `n` tokens, with 0 before them."""
    missing = x.v.shape[1] - x.q.shape[1]

    def silent(t: Tensor) -> Tensor:
        return torch.cat([t.new_zeros(t.shape[0], missing, *t.shape[2:]), t], 1)

    weights = None if x.level_weights is None else silent(x.level_weights)
    return x._replace(q=silent(x.q), level_weights=weights)
