"""Sequences that do not fill their rows, packed one after another or padded on either side, as operands."""

from __future__ import annotations

from torch import Tensor

from llcompile.kernels.layout import Operands
from llcompile.kernels.operands import check_bounds, check_indices, check_mask
from llcompile.kernels.ragged import Spans, spans_of_bounds, spans_of_indices, spans_of_mask


def in_place(x: Operands, cu_seqlens: Tensor | None, attention_mask: Tensor | None, seq_idx: Tensor | None) -> Operands:
    """The operands of rows as they are; of sequences where they lie, in a batch of one.

    Args:
        x: operands of rows ``[B, T, ...]``.
        cu_seqlens: ``[N + 1]`` bounds of packed sequences, in a batch of one.
        attention_mask: ``[B, T]``, non-zero at real tokens.
        seq_idx: ``[B, T]``, the sequence that each token belongs to.

    Raises:
        OperandError: one of them has a wrong shape, dtype or value.
    """
    spans = _spans(x.v, cu_seqlens, attention_mask, seq_idx)
    if spans is None:
        return x
    tensors = (None if t is None else flat(t) for t in x[:6])
    return Operands(*tensors, x.initial_state, spans.lengths, spans.starts)  # type: ignore[call-arg, arg-type]


def _spans(v: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None, seq_idx: Tensor | None) -> Spans | None:
    """Where the sequences are, after a check; None where each fills its row."""
    if cu_seqlens is not None:
        check_bounds(cu_seqlens, v)
        return spans_of_bounds(cu_seqlens)
    if seq_idx is not None:
        check_indices(seq_idx, v)
        return spans_of_indices(seq_idx)
    if mask is None:
        return None
    check_mask(mask, v)
    full = mask.device.type == "cpu" and bool((mask != 0).all())
    return None if full else spans_of_mask(mask)


def flat(x: Tensor) -> Tensor:
    """``[B, T, ...] -> [1, B * T, ...]``, a view where strides allow it; a decay per head stays."""
    return x if x.dim() < 3 else x.flatten(0, 1)[None]
