"""The operator on sequences that do not fill their rows: packed one after another, or padded on either side.

One torch operator around the plain one. Where the sequences are is a tensor's value, so the rows that they are moved to
have a width that no compiler knows; inside an operator that is nobody's concern.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import operators
from .operands import check_bounds, check_indices, check_mask
from .ragged import Rows, from_rows, rows_of_bounds, rows_of_indices, rows_of_mask, to_rows
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
    rows = _rows(v, cu_seqlens, attention_mask, seq_idx)
    tensors = (q, k, v, level_weights, log_decay, beta)
    run = torch.ops.llcompile.loglinear_attention
    if rows is None:
        o, state = run(*tensors, initial_state, scale, return_final_state)
        return o, state
    moved = (to_rows(x, rows) for x in tensors)
    o, state = run(*moved, initial_state, scale, return_final_state, rows.lengths)
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
    rows = _rows(v, cu_seqlens, attention_mask, seq_idx)
    tensors = (q, k, v, level_weights, log_decay, beta)
    run = torch.ops.llcompile.loglinear_attention_backward
    if rows is None:
        return run(grad_o, grad_state, *tensors, initial_state, scale, return_final_state)  # type: ignore[no-any-return]
    moved = [to_rows(x, rows) for x in (grad_o, *tensors)]
    *grads, d_state = run(moved[0], grad_state, *moved[1:], initial_state, scale, return_final_state, rows.lengths)
    # A token stands in one place of the rows, so that moving back is the adjoint of moving there.
    back = [
        from_rows(d, rows).reshape(x.shape) if x is not None and x.dim() > 2 else d
        for x, d in zip(tensors, grads, strict=True)
    ]
    return (*back, d_state)  # type: ignore[return-value]


def _rows(v: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None, seq_idx: Tensor | None) -> Rows | None:
    """Where the sequences are; None where each fills its row."""
    if cu_seqlens is not None:
        check_bounds(cu_seqlens, v)
        return rows_of_bounds(cu_seqlens, v.shape[1])
    if seq_idx is not None:
        check_indices(seq_idx, v)
        return rows_of_indices(seq_idx)
    assert mask is not None
    check_mask(mask, v)
    if mask.device.type == "cpu" and bool((mask != 0).all()):
        return None
    return rows_of_mask(mask)


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
