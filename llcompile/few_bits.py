"""Matrices of numbers in a few bits each: integers with a scale for each matrix and a factor for each of its rows."""

from __future__ import annotations

import torch
from torch import Tensor

# Numbers of bits that are used. With more, float32 is not much larger.
BITS = range(2, 17)
_FACTORS = 255  # a row's factor is a multiple of 1 / 255: one byte
_BYTE = 8


def scales_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """What to divide matrices `[N, K, V]` by, so that all numbers are at most 1.

    Returns:
        a scale for each matrix, `[N]` float32, and a factor for each row, `[N, K]` uint8, of which `row_scales` makes
        a scale for each row.
    """
    rows = x.abs().amax(2)  # [N, K]
    # So small numbers have no inverse; they become 0.
    largest = rows.amax(1).clamp(min=_FACTORS * torch.finfo(torch.float32).tiny)
    factors = (rows / largest[:, None] * _FACTORS).ceil().clamp(1, _FACTORS)
    return largest, factors.to(torch.uint8)


def row_scales(scales: Tensor, factors: Tensor) -> Tensor:
    """`[N, K, 1]` float32."""
    return (scales[:, None] * (factors.float() / _FACTORS))[:, :, None]


def rounded(x: Tensor, rows: Tensor, bits: int) -> Tensor:
    """Integers `[N, K, V]` (float32) for `x / rows`, as many on both sides of 0 as `bits` allow."""
    most = _most(bits)
    return (x / rows * most).round().clamp(-most, most)


def restored(integers: Tensor, rows: Tensor, bits: int) -> Tensor:
    """The numbers `[N, K, V]` that integers stand for, float32."""
    return integers.float() * (rows / _most(bits))


def pack(integers: Tensor, bits: int) -> Tensor:
    """Integers `[N, K, V]` without gaps between them, `[N, bytes]` uint8; the lowest bit first."""
    numbers = integers.flatten(1).to(torch.int32) + _most(bits)  # [N, K * V], not negative
    digits = (numbers[:, :, None] >> _places(bits, numbers)) & 1
    digits = digits.to(torch.uint8).flatten(1)  # [N, K * V * bits]
    digits = torch.nn.functional.pad(digits, (0, -digits.shape[1] % _BYTE)).unflatten(1, (-1, _BYTE))
    return (digits << _places(_BYTE, digits).to(torch.uint8)).sum(2, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int, rows: int, columns: int) -> Tensor:
    """The integers `[N, K, V]` (int32) that `pack` was given."""
    digits = (packed[:, :, None] >> _places(_BYTE, packed).to(torch.uint8)) & 1
    digits = digits.flatten(1)[:, : rows * columns * bits].unflatten(1, (-1, bits))
    numbers = (digits.to(torch.int32) << _places(bits, packed)).sum(2, dtype=torch.int32)
    return (numbers - _most(bits)).unflatten(1, (rows, columns))


def _most(bits: int) -> int:
    """The largest integer."""
    return (1 << (bits - 1)) - 1


def _places(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, device=like.device, dtype=torch.int32)
