"""Per-level readouts as PyTorch sees them, in the namespace `llcompile`; the rules are those of `operators`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llcompile.kernels import choice, routing_state, torch_operator
from llcompile.kernels.operators import own, plain
from llcompile.kernels.readouts import Readouts, ReadoutToken, in_place
from llcompile.kernels.state import state_dtype

_INPUTS = (
    "Tensor query, Tensor key, int levels, Tensor? initial_state, Tensor? cu_seqlens=None, "
    'Tensor? attention_mask=None, Tensor? seq_idx=None, bool return_final_state=False, str revision=""'
)
_TOKEN_INPUTS = 'Tensor query, Tensor key, Tensor state, int levels, str revision=""'


def _readouts(*inputs: Any) -> tuple[Tensor, Tensor]:
    x, return_final_state = _read(inputs)
    query = inputs[0]
    if x.initial_state is not None:
        routing_state.check(x.initial_state, x.rows, *_sizes(x))
        routing_state.check_position(x.initial_state, query.shape[1])
    with plain(query):
        readouts, state = choice.readouts(x, return_final_state)
    return readouts.reshape(*query.shape[:3], x.levels), state


def _readouts_backward(grad: Tensor, grad_state: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    x, return_final_state = _read(inputs)
    query, key, _, state, *_ = inputs
    grad = grad.reshape(*x.query.shape[:3], x.levels)
    with plain(query):
        found = choice.readouts_backward(x, grad, grad_state if return_final_state else None)
    given = (query, key, query.new_empty(0) if state is None else state)
    return tuple(
        t if d is None else d.to(t.dtype).reshape(t.shape).contiguous() for t, d in zip(given, found, strict=True)
    )


def _step(query: Tensor, key: Tensor, state: Tensor, levels: int, _: str) -> tuple[Tensor, Tensor]:
    routing_state.check_either(state, query.shape[0], query.shape[1], levels, query.shape[2], "state")
    with plain(query):
        return choice.readouts_step(ReadoutToken(query, key, state, levels))


def _read(inputs: tuple[Any, ...]) -> tuple[Readouts, bool]:
    """The operands, with the sequences where they are, and whether a final state is asked for."""
    query, key, levels, state, cu_seqlens, attention_mask, seq_idx, return_final_state, _ = inputs
    return in_place(Readouts(query, key, levels, state), cu_seqlens, attention_mask, seq_idx), return_final_state


def _sizes(x: Readouts) -> tuple[int, int, int]:
    """W, L and R."""
    return x.query.shape[2], x.levels, x.query.shape[3]


def _readout_shapes(*inputs: Any) -> tuple[Tensor, Tensor]:
    query, _, levels, _, cu_seqlens, _, _, return_final_state, _ = inputs
    batch, tokens, sets, channels = query.shape
    rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = (rows, sets, routing_state.size(levels, channels)) if return_final_state else (0,)
    dtype = state_dtype(query.dtype)
    return query.new_empty((batch, tokens, sets, levels), dtype=dtype), query.new_empty(state, dtype=dtype)


def _backward_shapes(grad: Tensor, grad_state: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    query, key, _, state, *_ = inputs
    like = (query, key, state)
    return tuple(query.new_empty(0) if t is None else t.new_empty(t.shape) for t in like)


def _step_shapes(query: Tensor, key: Tensor, state: Tensor, levels: int, _: str) -> tuple[Tensor, Tensor]:
    dtype = state_dtype(query.dtype)
    shape = (*query.shape[:2], routing_state.size(levels, query.shape[2]))
    return query.new_empty((*query.shape[:2], levels), dtype=dtype), query.new_empty(shape, dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    query, key, ctx.levels, state, cu_seqlens, attention_mask, seq_idx, ctx.return_final_state, ctx.revision = inputs
    ctx.save_for_backward(query, key, own(state), cu_seqlens, attention_mask, seq_idx)


def _gradient(ctx: Any, grad: Tensor, grad_state: Tensor) -> tuple[Any, ...]:
    query, key, state, *sequences = ctx.saved_tensors
    d_query, d_key, d_state = torch.ops.llcompile.level_readouts_backward.default(
        grad, grad_state, query, key, ctx.levels, state, *sequences, ctx.return_final_state, revision=ctx.revision
    )
    return d_query, d_key, None, None if state is None else d_state, None, None, None, None, None


def _save_step(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    query, key, state, ctx.levels, ctx.revision = inputs
    _, sets, channels = query.shape
    ctx.state_shape = state.shape
    ctx.save_for_backward(query, key, routing_state.own(state, sets, ctx.levels, channels))


def _step_gradient(ctx: Any, grad: Tensor, grad_state: Tensor) -> tuple[Any, ...]:
    """A step is the operator on one token, so its gradient is that operator's."""
    query, key, state = ctx.saved_tensors
    d_query, d_key, d_state = torch.ops.llcompile.level_readouts_backward.default(
        grad.unsqueeze(1), grad_state, query.unsqueeze(1), key.unsqueeze(1), ctx.levels, state,
        return_final_state=True, revision=ctx.revision,
    )  # fmt: skip
    d_state = routing_state.gradient_of(d_state, ctx.state_shape)
    return d_query.squeeze(1), d_key.squeeze(1), d_state, None, None


torch_operator.define(
    f"level_readouts_backward(Tensor grad, Tensor grad_state, {_INPUTS}) -> (Tensor, Tensor, Tensor)",
    _readouts_backward,
    _backward_shapes,
)
torch_operator.define(f"level_readouts({_INPUTS}) -> (Tensor, Tensor)", _readouts, _readout_shapes, _save, _gradient)
torch_operator.define(
    f"level_readouts_step({_TOKEN_INPUTS}) -> (Tensor, Tensor)", _step, _step_shapes, _save_step, _step_gradient
)
