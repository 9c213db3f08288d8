"""Packed sequences as a padded batch: moved to rows that start at token 0, with a length each, and back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llcompile.kernels.operands import Operands


class Rows(NamedTuple):
    """Where every sequence's tokens are, and where every token went."""

    gather: Tensor  # [rows * width] index of a token, for each place in the rows
    scatter: Tensor  # [T] index of a place in the flattened rows, for each token
    real: Tensor  # [T] bool: tokens that belong to a sequence
    lengths: Tensor  # [rows]
    width: int


def rows_of(x: Operands) -> Rows:
    """The rows of packed operands."""
    assert x.starts is not None
    assert x.lengths is not None
    return rows_between(x.starts, x.lengths, x.v.shape[1])


def rows_between(starts: Tensor, lengths: Tensor, tokens: int) -> Rows:
    """The rows of sequences that lie one after another among `tokens`: `lengths [N]` of each from `starts [N]` on."""
    width = int(lengths.max()) if lengths.numel() else 0  # the one value that has to be known to make the rows
    place = torch.arange(width, device=starts.device)
    gather = (starts[:, None] + place).clamp(max=max(tokens - 1, 0))
    token = torch.arange(tokens, device=starts.device)
    row = (torch.searchsorted(starts, token, right=True) - 1).clamp(min=0)  # empty ones start where the next one does
    place = token - starts[row]
    real = (place >= 0) & (place < lengths[row])
    return Rows(gather.flatten(), torch.where(real, row * width + place, 0), real, lengths, width)


def in_rows(x: Operands, rows: Rows) -> Operands:
    """Each sequence at the start of a row of its own."""
    return x.map_tokens(lambda t: to_rows(t, rows))._replace(lengths=rows.lengths, starts=None)


def to_rows(x: Tensor, rows: Rows) -> Tensor:
    """Tokens `[1, T, ...]` to rows `[rows, width, ...]`; places past a row's length hold any tokens."""
    return x[0].index_select(0, rows.gather).reshape(rows.lengths.shape[0], rows.width, *x.shape[2:])


def from_rows(o: Tensor, rows: Rows) -> Tensor:
    """Rows `[rows, width, ...]` back to tokens `[1, T, ...]`; 0 at padding."""
    o = o.flatten(0, 1)
    if not o.shape[0]:
        return o.new_zeros(1, rows.real.shape[0], *o.shape[1:])
    return torch.where(rows.real[(...,) + (None,) * (o.dim() - 1)], o.index_select(0, rows.scatter), 0)[None]
