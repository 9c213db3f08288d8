"""Level weights inside a chunk: from one weight per token and level to one per pair of tokens, and back."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from llcompile.kernels.levels import level_table


def spread(w: Tensor) -> Tensor:
    """`[..., C, log2 C + 1] -> [..., C, C]`: the weight of each pair's level (above the diagonal, anything)."""
    return cast(Tensor, _Spread.apply(w))


class _Spread(torch.autograd.Function):
    """Its own gradient: that of an index is an index_add, four times the time of `gather_back`."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        index, _, _ = _tables(w.shape[-2], w.dtype, w.device)
        return _select(w.flatten(-2), index).unflatten(-1, (w.shape[-2], -1))

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Tensor:  # type: ignore[override]
        return gather_back(d)


def gather_back(d: Tensor) -> Tensor:
    """Adjoint of `spread` for causal `d`: `[..., C, C] -> [..., C, log2 C + 1]`.

    A level of a row is an aligned block of columns. The sums of all aligned blocks are one GEMM with a 0/1 table; what
    then belongs to a row and level is picked out.
    """
    size = d.shape[-1]
    _, blocks, pick = _tables(size, d.dtype, d.device)
    sums = (d @ blocks).flatten(-2)  # [..., C * blocks]
    levels = _select(sums, pick).unflatten(-1, (size, -1))  # [..., C, log2 C]
    return torch.cat([d.diagonal(dim1=-2, dim2=-1)[..., None], levels], -1)


def _select(x: Tensor, index: Tensor) -> Tensor:
    return x.flatten(0, -2).index_select(1, index).view(*x.shape[:-1], -1)


@lru_cache(maxsize=16)
def _tables(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Index of `spread`, block table `[C, C]` and index of `gather_back`.

    The left halves of all aligned blocks are `C - 1` columns of the table (`C / 2` of one token, `C / 4` of two,
    ...); its last column is 0 and stands for the buckets that a row does not have.
    """
    depth = size.bit_length() - 1
    token = torch.arange(size, device=device)
    table = level_table(size, device)
    index = (token[:, None] * (depth + 1) + table).flatten()
    blocks = torch.zeros(size, size, dtype=dtype, device=device)
    pick = torch.full((size, depth), size - 1, dtype=torch.int64, device=device)
    column = 0
    for lvl in range(1, depth + 1):
        half = 1 << (lvl - 1)
        for start in range(0, size, 2 * half):
            blocks[start : start + half, column] = 1
            pick[start + half : start + 2 * half, lvl - 1] = column
            column += 1
    return index, blocks, (token[:, None] * size + pick).flatten()
