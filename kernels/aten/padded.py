"""Packed sequences as a padded batch: moved to rows that start at token 0, with a length each, and back after it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llcompile.kernels.aten import finite, slabs
from llcompile.kernels.operands import Operands


def forward(x: Operands, scale: float, return_final_state: bool) -> tuple[Tensor, Tensor]:
    """The forward pass on ATen operations, of rows or of sequences where they are."""
    if x.starts is None:
        return finite.forward(x, scale, return_final_state)
    rows = _rows(x)
    o, state = finite.forward(_in_rows(x, rows), scale, return_final_state)
    return _from_rows(o, rows), state


def backward(x: Operands, scale: float, grad_o: Tensor, grad_state: Tensor | None) -> list[Tensor | None]:
    """The backward pass, likewise. A token stands in one place of the rows: moving back is moving there's adjoint."""
    if x.starts is None:
        return slabs.backward(x, scale, grad_o, grad_state)
    rows = _rows(x)
    grads = slabs.backward(_in_rows(x, rows), scale, _to_rows(grad_o, rows), grad_state)
    back = [d if d is None or d.dim() < 3 else _from_rows(d, rows) for d in grads[:6]]
    return [*back, grads[6]]


class _Rows(NamedTuple):
    """Where every sequence's tokens are, and where every token went."""

    gather: Tensor  # [rows * width] index of a token, for each place in the rows
    scatter: Tensor  # [T] index of a place in the flattened rows, for each token
    real: Tensor  # [T] bool: tokens that belong to a sequence
    lengths: Tensor  # [rows]
    width: int


def _rows(x: Operands) -> _Rows:
    starts, lengths, tokens = x.starts, x.lengths, x.v.shape[1]
    assert starts is not None
    assert lengths is not None
    width = int(lengths.max()) if lengths.numel() else 0  # the one value that has to be known to make the rows
    place = torch.arange(width, device=starts.device)
    gather = (starts[:, None] + place).clamp(max=max(tokens - 1, 0))
    token = torch.arange(tokens, device=starts.device)
    row = (torch.searchsorted(starts, token, right=True) - 1).clamp(min=0)  # empty ones start where the next one does
    place = token - starts[row]
    real = (place >= 0) & (place < lengths[row])
    return _Rows(gather.flatten(), torch.where(real, row * width + place, 0), real, lengths, width)


def _in_rows(x: Operands, rows: _Rows) -> Operands:
    """Each sequence at the start of a row of its own."""
    return x.map_tokens(lambda t: _to_rows(t, rows))._replace(lengths=rows.lengths, starts=None)


def _to_rows(x: Tensor, rows: _Rows) -> Tensor:
    """Tokens `[1, T, ...]` to rows `[rows, width, ...]`; places past a row's length hold any tokens."""
    return x[0].index_select(0, rows.gather).reshape(rows.lengths.shape[0], rows.width, *x.shape[2:])


def _from_rows(o: Tensor, rows: _Rows) -> Tensor:
    """Rows `[rows, width, ...]` back to tokens `[1, T, ...]`; 0 at padding."""
    o = o.flatten(0, 1)
    if not o.shape[0]:
        return o.new_zeros(1, rows.real.shape[0], *o.shape[1:])
    return torch.where(rows.real[(...,) + (None,) * (o.dim() - 1)], o.index_select(0, rows.scatter), 0)[None]
