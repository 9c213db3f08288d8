"""Level arithmetic of the Fenwick tree (arXiv 2506.04761), in integers only.

`level(t, s) = bit_length(t XOR s)` says in which bucket the query at position `t` sees the token at `s <= t`.
Every function takes python ints as well as integer tensors; floats never appear, since `log2` of a large integer
rounds to the wrong side of a power of two.
"""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

# Positions are int64: no sequence needs more.
MOST_LEVELS = 64


@overload
def bit_length(x: int) -> int: ...
@overload
def bit_length(x: Tensor) -> Tensor: ...
def bit_length(x: int | Tensor) -> int | Tensor:
    """Number of bits of `x >= 0` (0 for 0); elementwise and of the same shape for an integer tensor."""
    if isinstance(x, int):
        return x.bit_length()
    length = torch.zeros_like(x, dtype=torch.int64)
    x = x.to(torch.int64)
    for shift in (32, 16, 8, 4, 2, 1):  # binary search for the highest set bit
        high = (x >> shift) > 0
        length = length + high * shift
        x = torch.where(high, x >> shift, x)
    return length + (x > 0)


@overload
def level(t: int, s: int) -> int: ...
@overload
def level(t: Tensor, s: int | Tensor) -> Tensor: ...
@overload
def level(t: int, s: Tensor) -> Tensor: ...
def level(t: int | Tensor, s: int | Tensor) -> int | Tensor:
    """Level at which the query at position `t` sees the token at position `s <= t`; tensors broadcast."""
    return bit_length(t ^ s)


def level_count(length: int) -> int:
    """Levels that a sequence of `length` tokens needs: `ceil(log2 length) + 1` (1 for an empty one)."""
    return max(length - 1, 0).bit_length() + 1


@overload
def trailing_zeros(x: int) -> int: ...
@overload
def trailing_zeros(x: Tensor) -> Tensor: ...
def trailing_zeros(x: int | Tensor) -> int | Tensor:
    """Zero bits below the lowest set bit of `x > 0`. Of 0 it is -1, which keeps it a total function."""
    return bit_length(x & -x) - 1


@overload
def bucket_start(t: int, lvl: int) -> int: ...
@overload
def bucket_start(t: Tensor, lvl: int | Tensor) -> Tensor: ...
def bucket_start(t: int | Tensor, lvl: int | Tensor) -> int | Tensor:
    """First position of the bucket of level `lvl` at query `t`, where that bucket exists.

    The bucket of level `l >= 1` exists iff bit `l - 1` of `t` is set. It holds `2 ** (l - 1)` tokens and starts
    at `t` with its low `l` bits cleared.
    """
    return (t >> lvl) << lvl


def level_table(size: int, device: torch.device | None = None) -> Tensor:
    """Levels of all pairs of `size` aligned positions, `[size, size]` int64 (row = query; symmetric)."""
    index = torch.arange(size, device=device)
    return level(index[:, None], index[None, :])
