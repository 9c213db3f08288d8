"""Where the sequences of a packed batch lie, as kernels need it: tables made on the device, nothing waits for it.

Sequences lie one after another in one row of the operands, and so do their chunks in every buffer that has an entry a
chunk: N counts the chunks of all. How many chunks there are at most follows from the numbers of
tokens and of sequences, which the host knows; memory grows with their sum, whatever the longest sequence is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from llcompile.kernels.grid import Grid
from llcompile.kernels.levels import bit_length, bucket_start, level, trailing_zeros


class Packing(NamedTuple):
    """The chunks of all sequences, one after another."""

    chunks: int  # room: at least as many as there are
    first_chunks: Tensor  # [rows + 1] int32: of each sequence, then the end of all
    chunk_sequences: Tensor  # [chunks] int32: the sequence of each chunk, -1 behind the last


@dataclass(frozen=True)
class PackedGrid(Grid):
    """The grid of packed sequences: each has offset and edge of its own, by its own length."""

    starts: Tensor  # [rows] each sequence's first token
    edges: Tensor  # [rows] e of `grid`

    def true_levels(self, batch: int, device: torch.device) -> Tensor:
        """As `Grid.true_levels`."""
        table = torch.arange(self.levels, device=device).expand(batch, -1)
        if self.position is None:
            return table
        edge = self.edges[:, None]
        crossing = edge + trailing_zeros((self.position[:, None] >> edge) + 1) + 1
        return torch.where(table > edge, crossing, table)

    def old_levels(self, batch: int, device: torch.device, count: int) -> tuple[Tensor, Tensor]:
        """As `Grid.old_levels`, the first result `[1, T, count]` for the tokens of all sequences."""
        assert self.lengths is not None
        position = torch.zeros_like(self.lengths) if self.position is None else self.position
        old_level = torch.arange(count, device=device)
        start = bucket_start(position[:, None], old_level)  # [rows, count]
        last = (position + self.lengths - 1).clamp(min=0)[:, None]
        token = torch.arange(self.tokens, device=device)
        sequence = (torch.searchsorted(self.starts, token, right=True) - 1).clamp(min=0)
        token = (position - self.starts)[sequence] + token  # in its sequence
        seen = level(token.clamp(min=0)[:, None], start[sequence]).maximum(old_level)
        final = level(last, start).maximum(old_level)
        fixed = old_level == count - 1
        seen, final = (torch.where(fixed, count - 1, x.clamp(max=count - 1)) for x in (seen, final))
        return seen[None], final


def packed_grid(tokens: int, starts: Tensor, lengths: Tensor, position: Tensor | None, chunk: int) -> PackedGrid:
    """The grid for sequences of `lengths [rows]` that continue at `position [rows]`."""
    edges = bit_length((lengths - 1).clamp(min=0))
    offset = None if position is None else position & ((1 << edges) - 1)
    chunks = _room(tokens, lengths.shape[0], offset is not None, chunk)
    return PackedGrid(tokens, chunk, chunks, tokens.bit_length(), position, offset, lengths, starts, edges)


def pack(grid: PackedGrid) -> Packing:
    """Lay out the chunks of `grid`; every sequence has one, an empty one, too."""
    assert grid.lengths is not None
    size = grid.lengths if grid.offset is None else grid.lengths + grid.offset
    ends = (-(-size // grid.chunk)).clamp(min=1).cumsum(0)
    if ends.device.type == "cuda":
        torch._assert_async(ends[-1] <= grid.chunks, "packed sequences have more tokens than there are")
    sequence = torch.searchsorted(ends, torch.arange(grid.chunks, device=ends.device), right=True)
    sequence = torch.where(sequence < ends.shape[0], sequence, -1)
    first = torch.nn.functional.pad(ends, (1, 0))
    return Packing(grid.chunks, first.to(torch.int32), sequence.to(torch.int32))


def _room(tokens: int, rows: int, offset: bool, chunk: int) -> int:
    """Most chunks that `rows` sequences of `tokens` tokens together can have.

    An offset is less than twice the length, or 0 where the length is 1.
    """
    return tokens * (3 if offset else 1) // chunk + rows
