"""Mask: M_H, the matrix of level weights, as the squares that it is made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llcompile.kernels.levels import level


@dataclass(frozen=True)
class Block:
    """The pairs of tokens that share a level and a bucket: queries `row ... row + size - 1`, keys `column ...`."""

    level: int
    row: int
    column: int
    size: int


def blocks(tokens: int) -> Iterator[Block]:
    """The squares of the lower triangle of `tokens` positions, a power of two, the diagonal first.

    A bucket of level l >= 1 holds 2^(l-1) tokens, and is read by the 2^(l-1) tokens that follow it.
    """
    for t in range(tokens):
        yield Block(0, t, t, 1)
    size = 1
    while size < tokens:
        for column in range(0, tokens, 2 * size):
            yield Block(level(column + size, column), column + size, column, size)
        size *= 2
