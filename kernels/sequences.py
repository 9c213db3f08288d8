"""The operator on sequences that do not fill their rows: packed one after another, or padded on either side.

One torch operator around the plain one. The Triton kernels read sequences where they are. For the ATen lowering they
are moved to rows, whose width is a tensor's value, which no compiler knows; in an operator that is nobody's concern.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import choice, operators
from .layout import Operands
from .operands import check_bounds, check_indices, check_mask
from .ragged import (
    Rows,
    bounds_of_indices,
    from_rows,
    rows_of_bounds,
    rows_of_mask,
    spans_of_bounds,
    spans_of_mask,
    to_rows,
)
from .state import state_dtype


@torch.library.custom_op("llcompile::loglinear_attention_ragged", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    level_weights: Tensor | None,
    log_decay: Tensor | None,
    beta: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    return_final_state: bool,
    cu_seqlens: Tensor | None,
    attention_mask: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor]:
    x = Operands(q, k, v, level_weights, log_decay, beta, initial_state, None)
    bounds, mask = _where(v, cu_seqlens, attention_mask, seq_idx)
    if bounds is None and mask is None:
        return operators.run(x, scale, return_final_state)
    packed = _packed(x, bounds, mask)
    if choice.by_triton(packed, return_final_state):
        o, state = operators.run(packed, scale, return_final_state)
        return o.reshape(v.shape), state
    rows = _rows(v, bounds, mask)
    o, state = operators.run(_in_rows(x, rows), scale, return_final_state)
    return from_rows(o, rows).reshape(v.shape), state


@torch.library.custom_op("llcompile::loglinear_attention_ragged_backward", mutates_args=())
def _attention_backward(
    grad_o: Tensor,
    grad_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    level_weights: Tensor | None,
    log_decay: Tensor | None,
    beta: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    return_final_state: bool,
    cu_seqlens: Tensor | None,
    attention_mask: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    x = Operands(q, k, v, level_weights, log_decay, beta, initial_state, None)
    last = grad_state if return_final_state else None
    bounds, mask = _where(v, cu_seqlens, attention_mask, seq_idx)
    if bounds is None and mask is None:
        return operators.run_backward(x, scale, grad_o, last)  # type: ignore[return-value]
    packed = _packed(x, bounds, mask)
    if choice.by_triton(packed, return_final_state):
        grads = operators.run_backward(packed, scale, _flat(grad_o), last)
    else:
        rows = _rows(v, bounds, mask)
        moved = to_rows(grad_o, rows)
        assert moved is not None
        # A token stands in one place of the rows, so that moving back is the adjoint of moving there.
        found = operators.run_backward(_in_rows(x, rows), scale, moved, last)
        grads = tuple(
            from_rows(d, rows) if i < 6 and tensor is not None and tensor.dim() > 2 else d
            for i, (tensor, d) in enumerate(zip(x[:7], found, strict=True))
        )
    return tuple(d if t is None else d.reshape(t.shape) for t, d in zip(x[:7], grads, strict=True))  # type: ignore[return-value]


def _where(
    v: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None, seq_idx: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Bounds in the flattened batch, or a mask ``[B, T]``, after a check; neither where each sequence fills its row."""
    if cu_seqlens is not None:
        check_bounds(cu_seqlens, v)
        return cu_seqlens, None
    if seq_idx is not None:
        check_indices(seq_idx, v)
        return bounds_of_indices(seq_idx), None
    assert mask is not None
    check_mask(mask, v)
    full = mask.device.type == "cpu" and bool((mask != 0).all())
    return None, None if full else mask


def _rows(v: Tensor, bounds: Tensor | None, mask: Tensor | None) -> Rows:
    if bounds is not None:
        return rows_of_bounds(bounds, v.shape[0] * v.shape[1])
    assert mask is not None
    return rows_of_mask(mask)


def _in_rows(x: Operands, rows: Rows) -> Operands:
    """Each sequence moved to the start of a row of its own."""
    return Operands(*(to_rows(t, rows) for t in x[:6]), x.initial_state, rows.lengths)  # type: ignore


def _packed(x: Operands, bounds: Tensor | None, mask: Tensor | None) -> Operands:
    """Sequences where they are, in a batch of one."""
    if bounds is not None:
        spans = spans_of_bounds(bounds)
    else:
        assert mask is not None
        spans = spans_of_mask(mask)
    return Operands(*(_flat(t) for t in x[:6]), x.initial_state, spans.lengths, spans.starts)  # type: ignore


def _flat(x: Tensor | None) -> Any:
    """``[B, T, ...] -> [1, B * T, ...]``, a view where strides allow it; a decay per head stays."""
    return x if x is None or x.dim() < 3 else x.flatten(0, 1)[None]


@_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    level_weights: Tensor | None,
    log_decay: Tensor | None,
    beta: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    return_final_state: bool,
    cu_seqlens: Tensor | None,
    attention_mask: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor]:
    one = operators._state_shape(q, v, level_weights)
    sequences = one[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (sequences, *one[1:]) if return_final_state else (0,)
    return v.new_empty(v.shape), v.new_empty(shape, dtype=state_dtype(v.dtype))


@_attention_backward.register_fake
def _(grad_o: Tensor, grad_state: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    q, inputs = rest[0], rest[:7]
    return tuple(q.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, scale, return_final_state, cu_seqlens, mask, seq_idx = inputs
    ctx.save_for_backward(*tensors, cu_seqlens, mask, seq_idx)
    ctx.scale, ctx.return_final_state = scale, return_final_state


def _gradient(ctx: Any, grad_o: Tensor, grad_state: Tensor) -> tuple[Any, ...]:
    *tensors, cu_seqlens, mask, seq_idx = ctx.saved_tensors
    grads = torch.ops.llcompile.loglinear_attention_ragged_backward(
        grad_o, grad_state, *tensors, ctx.scale, ctx.return_final_state, cu_seqlens, mask, seq_idx
    )
    return (*operators._present(tensors, grads), None, None, None, None, None)


_attention.register_autograd(_gradient, setup_context=_save)
