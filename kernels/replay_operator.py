"""The operators of a `ReplayState`: tokens read of a state and of those since, and the state after these."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from llcompile.kernels import choice, torch_operator
from llcompile.kernels.operands import Operands, weights_per_head
from llcompile.kernels.operators import plain
from llcompile.kernels.state import check_positions, is_level_state, state_dtype


def _replay(*inputs: Any) -> Tensor:
    *tensors, occupied, scale, _ = inputs
    x = Operands(*tensors)
    assert x.initial_state is not None
    weights, state = weights_per_head(x.level_weights, x.v), x.initial_state.to(state_dtype(x.v.dtype))
    x = x._replace(level_weights=weights, initial_state=state)
    with plain(x.v):
        return choice.replay(x, occupied, scale)


def _shapes(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return v.new_empty((v.shape[0], q.shape[1], *v.shape[2:]))


# `q [B, T, G, K]` and `level_weights [B, T, W, L]` of the last T tokens; the other operands of all n, which are not in
# the state; `occupied [B, L]` as `replay.occupied_levels`. The output is `[B, T, H, V]`.
torch_operator.define(
    "loglinear_attention_replay(Tensor q, Tensor k, Tensor v, Tensor? level_weights, Tensor? log_decay, "
    "Tensor? decay_rate, Tensor? beta, Tensor? erase_query, Tensor? erase_key, Tensor state, Tensor? occupied, "
    'float scale, str revision="") -> Tensor',
    _replay,
    _shapes,
)


def _fold(*inputs: Any) -> Tensor:
    k, v, decay, rate, beta, erase_query, erase_key, state, occupied, merged, _ = inputs
    check_positions(state, v.shape[1], "state")
    state, weights = state.to(state_dtype(v.dtype)), None
    if is_level_state(state):
        weights = v.new_empty(v.shape[0], 0, v.shape[2], state.shape[2] - 1)
    x = Operands(k[:, :0], k, v, weights, decay, rate, beta, erase_query, erase_key, state)
    with plain(v):
        return choice.fold(x, occupied, merged)


def _state_like(
    k: Tensor, v: Tensor, decay: Any, rate: Any, beta: Any, erase_query: Any, erase_key: Any, state: Tensor, *_: Any
) -> Tensor:
    return state.new_empty(state.shape, dtype=state_dtype(v.dtype))


# The state after n tokens, with levels as the last of them sees them, or, with `merged`, as the next one will. The
# state before must have those that the first of them sees.
torch_operator.define(
    "loglinear_attention_fold(Tensor k, Tensor v, Tensor? log_decay, Tensor? decay_rate, Tensor? beta, "
    "Tensor? erase_query, Tensor? erase_key, Tensor state, Tensor? occupied, bool merged, "
    'str revision="") -> Tensor',
    _fold,
    _state_like,
)
