"""Sequences of different lengths (varlen): packed one after another, or padded on either side.

Levels count from the start of a sequence. The Triton and C++ kernels read sequences where they are (`Spans`), the
ATen lowering as a padded batch (`rows`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llcompile.kernels.operands import Operands, check_bounds, check_indices, check_mask


class Spans(NamedTuple):
    """Where sequences are in the flattened batch, in their order; none of them is looked at."""

    starts: Tensor  # [N] first token
    lengths: Tensor  # [N]


def spans_of_mask(mask: Tensor) -> Spans:
    """The sequences of a padded batch, mask `[B, T]` (non-zero = real, contiguous in each row)."""
    batch, width = mask.shape
    real = mask != 0
    lengths = real.sum(1)
    first = real.to(torch.int64).argmax(1) if width else lengths  # 0 in an empty row
    return Spans(torch.arange(batch, device=mask.device) * width + first, lengths)


def spans_of_bounds(cu_seqlens: Tensor) -> Spans:
    """The sequences of a packed batch of one row, from their bounds `[N + 1]`."""
    bounds = cu_seqlens.to(torch.int64)
    return Spans(bounds[:-1], bounds[1:] - bounds[:-1])


def spans_of_indices(seq_idx: Tensor) -> Spans:
    """Sequences packed in each row of a batch, from the sequence `[B, T]` that each token belongs to."""
    first = torch.ones_like(seq_idx, dtype=torch.bool)
    first[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    starts = first.flatten().nonzero()[:, 0]
    return spans_of_bounds(torch.cat([starts, starts.new_tensor([seq_idx.numel()])]))


def in_place(x: Operands, cu_seqlens: Tensor | None, attention_mask: Tensor | None, seq_idx: Tensor | None) -> Operands:
    """The operands of rows as they are; of sequences where they lie, in a batch of one.

    Args:
        x: operands of rows `[B, T, ...]`.
        cu_seqlens: `[N + 1]` bounds of packed sequences, in a batch of one.
        attention_mask: `[B, T]`, non-zero at real tokens.
        seq_idx: `[B, T]`, the sequence that each token belongs to.

    Raises:
        OperandError: one of them has a wrong shape, dtype or value.
    """
    spans = spans_of(x.v, cu_seqlens, attention_mask, seq_idx)
    if spans is None:
        return x
    return x.map_tokens(flat)._replace(lengths=spans.lengths, starts=spans.starts)


def spans_of(v: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None, seq_idx: Tensor | None) -> Spans | None:
    """Where the sequences of operands `v [B, T, ...]` are, after a check; None where each fills its row."""
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
    """`[B, T, ...] -> [1, B * T, ...]`, a view where strides allow it."""
    return x.flatten(0, 1)[None]
