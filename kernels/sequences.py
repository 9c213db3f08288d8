"""The operator on sequences that do not fill their rows: packed one after another, or padded on either side.

One torch operator beside the plain one. What runs it may have to know a tensor's value (the ATen lowering the longest
sequence, :mod:`.ragged`), which no compiler knows; inside an operator that is nobody's concern.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llcompile.kernels import operators, torch_operator
from llcompile.kernels.layout import Operands
from llcompile.kernels.operands import check_bounds, check_indices, check_mask
from llcompile.kernels.ragged import Spans, spans_of_bounds, spans_of_indices, spans_of_mask
from llcompile.kernels.state import state_dtype


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
    spans = _spans(v, cu_seqlens, attention_mask, seq_idx)
    x = _operands((q, k, v, level_weights, log_decay, beta, initial_state), spans)
    o, state = operators.run(x, scale, return_final_state)
    return o.reshape(v.shape), state


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
    inputs = (q, k, v, level_weights, log_decay, beta, initial_state)
    spans = _spans(v, cu_seqlens, attention_mask, seq_idx)
    grad_o = grad_o if spans is None else _flat(grad_o)
    grads = operators.run_backward(_operands(inputs, spans), scale, grad_o, grad_state if return_final_state else None)
    return tuple(d if x is None else d.reshape(x.shape) for x, d in zip(inputs, grads, strict=True))  # type: ignore


def _spans(v: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None, seq_idx: Tensor | None) -> Spans | None:
    """Where the sequences are, after a check; None where each fills its row."""
    if cu_seqlens is not None:
        check_bounds(cu_seqlens, v)
        return spans_of_bounds(cu_seqlens)
    if seq_idx is not None:
        check_indices(seq_idx, v)
        return spans_of_indices(seq_idx)
    assert mask is not None
    check_mask(mask, v)
    full = mask.device.type == "cpu" and bool((mask != 0).all())
    return None if full else spans_of_mask(mask)


def _operands(x: tuple[Tensor | None, ...], spans: Spans | None) -> Operands:
    """The operands of rows as they are, of sequences in a batch of one."""
    if spans is None:
        return Operands(*x, None)  # type: ignore
    return Operands(*(t if t is None else _flat(t) for t in x[:6]), x[6], spans.lengths, spans.starts)  # type: ignore


def _flat(x: Tensor) -> Tensor:
    """``[B, T, ...] -> [1, B * T, ...]``, a view where strides allow it; a decay per head stays."""
    return x if x.dim() < 3 else x.flatten(0, 1)[None]


def _attention_shapes(
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
    one = operators.state_shape(q, v, level_weights)
    sequences = one[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (sequences, *one[1:]) if return_final_state else (0,)
    return v.new_empty(v.shape), v.new_empty(shape, dtype=state_dtype(v.dtype))


def _attention_backward_shapes(grad_o: Tensor, grad_state: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    q, inputs = rest[0], rest[:7]
    return tuple(q.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, state, scale, return_final_state, cu_seqlens, mask, seq_idx = inputs
    ctx.save_for_backward(*tensors, operators.own(state), cu_seqlens, mask, seq_idx)
    ctx.scale, ctx.return_final_state = scale, return_final_state


def _gradient(ctx: Any, grad_o: Tensor, grad_state: Tensor) -> tuple[Any, ...]:
    *tensors, cu_seqlens, mask, seq_idx = ctx.saved_tensors
    grads = torch.ops.llcompile.loglinear_attention_ragged_backward(
        grad_o, grad_state, *tensors, ctx.scale, ctx.return_final_state, cu_seqlens, mask, seq_idx
    )
    return (*operators.present(tensors, grads), None, None, None, None, None)


torch_operator.define("loglinear_attention_ragged_backward", _attention_backward, _attention_backward_shapes)
torch_operator.define("loglinear_attention_ragged", _attention, _attention_shapes, _save, _gradient)
