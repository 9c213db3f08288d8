"""The operator that absorbs a token into a state in place, in the namespace `llcompile`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from llcompile.errors import StateError
from llcompile.kernels import choice, flops, torch_operator
from llcompile.kernels.operands import Token, weights_per_head
from llcompile.kernels.operators import plain
from llcompile.kernels.state import check_state, is_level_state


def _step(*inputs: Any) -> Tensor:
    *operands, _, routing = inputs
    x = Token(*operands)
    x = x._replace(level_weights=weights_per_head(x.level_weights, x.v))
    levels = None if x.level_weights is None else x.level_weights.shape[-1]
    check_state(x.state, x.v.shape[0], x.v.shape[1], x.q.shape[2], x.v.shape[2], levels, "state")
    if is_level_state(x.state) != (levels is not None):
        raise StateError(
            f"state {list(x.state.shape)} cannot become {'a level' if levels else 'a linear'} state in place; pass a "
            f"state [B, H, {'1 + L, ' if levels else ''}K, V], or use the operator that returns a new one, "
            "loglinear_attention_step"
        )
    with plain(x.v):
        return choice.step_in_place(x, routing)


def _shapes(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return v.new_empty(v.shape)


# As `loglinear_attention_step`. The state stays of its kind and dtype, and so does what stands in its header beside the
# position, but for the routing state.
torch_operator.define(
    "loglinear_attention_step_(Tensor q, Tensor k, Tensor v, Tensor? level_weights, Tensor(a!) state, "
    "Tensor? log_decay, Tensor? decay_rate, Tensor? beta, Tensor? erase_query, Tensor? erase_key, float scale, "
    'str revision="", Tensor? routing_state=None) -> Tensor',
    _step,
    _shapes,
)
flops.register_in_place()
