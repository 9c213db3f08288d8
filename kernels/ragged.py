"""Where the sequences of packed and padded batches are, and how they become rows that start at token 0.

Levels count from the start of a sequence. The Triton kernels read sequences where they are (:class:`Spans`). For the
ATen lowering they are moved to the start of a row each, and back after it (:class:`Rows`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Spans(NamedTuple):
    """Where sequences are in the flattened batch; none of them is looked at."""

    starts: Tensor  # [rows] first token
    lengths: Tensor  # [rows]


class Rows(NamedTuple):
    """Where every sequence's tokens are, and where every token went."""

    gather: Tensor  # [rows * width] index of a token in the flattened batch, for each place in the rows
    scatter: Tensor  # [B * T] index of a place in the flattened rows, for each token of the batch
    real: Tensor  # [B, T] bool: tokens that belong to a sequence
    lengths: Tensor  # [rows]
    width: int | torch.SymInt


def spans_of_mask(mask: Tensor) -> Spans:
    """The sequences of a padded batch, mask ``[B, T]`` (non-zero = real, contiguous in each row)."""
    batch, width = mask.shape
    real = mask != 0
    lengths = real.sum(1)
    first = real.to(torch.int64).argmax(1) if width else lengths  # 0 in an empty row
    return Spans(torch.arange(batch, device=mask.device) * width + first, lengths)


def spans_of_bounds(cu_seqlens: Tensor) -> Spans:
    """The sequences of a packed batch of one row, from their bounds ``[N + 1]``."""
    bounds = cu_seqlens.to(torch.int64)
    return Spans(bounds[:-1], bounds[1:] - bounds[:-1])


def bounds_of_indices(seq_idx: Tensor) -> Tensor:
    """Bounds ``[N + 1]`` in the flattened batch of the sequences ``[B, T]`` that its tokens belong to."""
    first = torch.ones_like(seq_idx, dtype=torch.bool)
    first[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    starts = first.flatten().nonzero()[:, 0]
    return torch.cat([starts, starts.new_tensor([seq_idx.numel()])])


def rows_of_mask(mask: Tensor) -> Rows:
    """Rows of a padded batch, mask as in :func:`spans_of_mask`."""
    batch, width = mask.shape
    starts, lengths = spans_of_mask(mask)
    base = torch.arange(batch, device=mask.device)[:, None] * width
    start = starts[:, None] - base
    place = torch.arange(width, device=mask.device)
    gather = base + (start + place).clamp(max=max(width - 1, 0))
    scatter = base + (place - start).clamp(min=0)
    return Rows(gather.flatten(), scatter.flatten(), mask != 0, lengths, width)


def rows_of_bounds(cu_seqlens: Tensor, tokens: int) -> Rows:
    """Rows of a packed batch of one row, bounds as in :func:`spans_of_bounds`."""
    bounds = cu_seqlens.to(torch.int64)
    start, lengths = spans_of_bounds(bounds)
    width = int(lengths.max()) if lengths.numel() else 0  # the one value that has to be known to make the rows
    place = torch.arange(width, device=bounds.device)
    gather = (start[:, None] + place).clamp(max=max(tokens - 1, 0))
    token = torch.arange(tokens, device=bounds.device)
    row = (torch.searchsorted(bounds, token, right=True) - 1).clamp(0, max(start.numel() - 1, 0))
    real = (token >= bounds[0]) & (token < bounds[-1])
    scatter = torch.where(real, row * width + token - start[row], 0)
    return Rows(gather.flatten(), scatter, real[None], lengths, width)


def to_rows(x: Tensor | None, rows: Rows) -> Tensor | None:
    """Tokens ``[B, T, ...]`` to rows ``[rows, width, ...]``; places past a row's length hold any tokens."""
    if x is None or x.dim() < 3:
        return x
    return x.flatten(0, 1).index_select(0, rows.gather).reshape(rows.lengths.shape[0], rows.width, *x.shape[2:])


def from_rows(o: Tensor, rows: Rows) -> Tensor:
    """Rows ``[rows, width, ...]`` back to tokens ``[B, T, ...]``; 0 at padding."""
    back = o.flatten(0, 1).index_select(0, rows.scatter).reshape(*rows.real.shape, *o.shape[2:])
    return torch.where(rows.real[(...,) + (None,) * (o.dim() - 2)], back, 0)
