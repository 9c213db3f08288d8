"""The header of a level state: how it carries a row's position through a cache of any floating dtype.

A number of its own would be rounded: bfloat16 counts to 256. So the position stands in octal digits, lowest first, one
in each of the header's first eight entries; 0 to 8 are exact in every dtype that has two bits of mantissa. The last
digit takes all that is left, which only float64 states need.

A header of fewer than eight entries (K * V < 8) has one number, `-(2 * position + 1)`: it is odd, and what a cast
rounds is even, so that the loss is seen. In both, a first entry that is positive and alone is the position itself: that
is what earlier versions wrote, and what is easily written by hand. Zeros are position 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

DIGITS = 8
BITS = 3  # of a digit


def has_digits(entries: int) -> bool:
    """Whether a header of `entries = K * V` holds the position in digits."""
    return entries >= DIGITS


def keeps(dtype: torch.dtype, entries: int) -> bool:
    """Whether a header of `entries` survives a cast to `dtype`."""
    try:
        step = torch.finfo(dtype).eps  # from 1 to the next number
    except (TypeError, RuntimeError):  # a dtype of packed numbers
        return False
    return step <= (2 ** (1 - BITS) if has_digits(entries) else torch.finfo(torch.float32).eps)


def largest(dtype: torch.dtype, entries: int) -> int:
    """The largest position that is counted in a state of `dtype`."""
    return 1 << (53 if dtype == torch.float64 else 24) - (not has_digits(entries))


def write(position: Tensor, key_dim: int, value_dim: int, dtype: torch.dtype) -> Tensor:
    """The headers `[B, K, V]` of rows at `position [B]`."""
    position, entries = position.to(torch.int64)[:, None], key_dim * value_dim
    if has_digits(entries):
        rest = position >> _shifts(position.device)
        written = torch.cat([rest[:, :-1] & ((1 << BITS) - 1), rest[:, -1:]], 1)
    else:
        written = -(2 * position + 1)[:, :entries]
    # Padded, not written into zeros: a decomposition of the operators must change no view.
    header = torch.nn.functional.pad(written.to(dtype), (0, entries - written.shape[1]))
    return header.unflatten(1, (key_dim, value_dim))


def read(header: Tensor) -> Tensor:
    """The positions `[B]` (int64) that headers `[B, K, V]` carry."""
    entries = header.detach().flatten(1)[:, :DIGITS]
    numbers = _wide(entries).round().to(torch.int64)
    if has_digits(entries.shape[1]):
        return (numbers << _shifts(numbers.device)).sum(1)
    first = numbers[:, 0]
    return torch.where(first < 0, (-first - 1) >> 1, first)


def damage(header: Tensor) -> Tensor:
    """Whether each of the headers `[B, K, V]` holds no position: what it held was rounded, or it never was one."""
    x = _wide(header.detach().flatten(1)[:, :DIGITS])
    first = x[:, 0]
    exact = 2 / torch.finfo(header.dtype).eps  # up to here the dtype has all whole numbers
    alone = (first >= 0) & (first < exact) & (x[:, 1:] == 0).all(1)
    if has_digits(x.shape[1]):
        kept = (x >= 0).all(1) & (x[:, :-1] < 1 << BITS).all(1)
    else:
        kept = (first < 0) & (first % 2 == 1)
    return ~((x == x.round()).all(1) & (alone | kept))


def _shifts(device: torch.device) -> Tensor:
    return torch.arange(0, DIGITS * BITS, BITS, device=device)


def _wide(x: Tensor) -> Tensor:
    """In a dtype that arithmetic is made for; float8 is for storage only."""
    return x if x.dtype == torch.float64 else x.float()
