"""The chunk grid: rows of tokens padded to whole chunks, aligned so that levels can be read off positions in the grid.

Levels depend on a token's position in its sequence. A row that continues a sequence at position `p` is therefore put
at offset `p mod 2 ** e` of the grid, `2 ** e >= T`. Within the grid, levels then come out right, except for pairs
on either side of grid position `2 ** e`: all these pairs of a row have one level, which depends on `p`; the weight
of the grid's top level is exchanged for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llcompile.kernels.description import CHUNK
from llcompile.kernels.levels import bucket_start, level, level_count, trailing_zeros


@dataclass(frozen=True)
class Grid:
    """Where the tokens of `B` rows of `T` are in a grid of `N` chunks of `C`."""

    tokens: int
    chunk: int
    chunks: int
    edge: int  # e of the module's text
    position: Tensor | None  # [B] tokens absorbed before; None: 0
    offset: Tensor | None  # [B] first grid position of each row; None: 0
    lengths: Tensor | None  # [B] tokens that count; None: all

    @property
    def size(self) -> int:
        """Positions in the grid."""
        return self.chunk * self.chunks

    @property
    def inner(self) -> int:
        """`log2 C`; levels up to it are inside chunks."""
        return self.chunk.bit_length() - 1

    @property
    def levels(self) -> int:
        """Levels that the grid has."""
        return level_count(self.size)

    def place(self, x: Tensor) -> Tensor:
        """`[B, T, A, ...] -> [B, A, N * C, ...]`, 0 where there is no token."""
        index, real = self._places(x.shape[0], x.device)
        moved = torch.where(real[(...,) + (None,) * (x.dim() - 2)], x, 0).flatten(0, 1)
        placed = moved.new_zeros(x.shape[0] * self.size, *x.shape[2:]).index_copy(0, index, moved)
        return placed.unflatten(0, (-1, self.size)).transpose(1, 2).contiguous()

    def take(self, x: Tensor) -> Tensor:
        """Adjoint of `place`: `[B, A, N * C, ...] -> [B, T, A, ...]`, 0 where a token does not count."""
        index, real = self._places(x.shape[0], x.device)
        moved = x.transpose(1, 2).flatten(0, 1).index_select(0, index).unflatten(0, real.shape)
        return torch.where(real[(...,) + (None,) * (x.dim() - 2)], moved, 0)

    def _places(self, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """For each token, the flat index `[B * T]` of its grid position, and whether it counts `[B, T]`."""
        first = torch.arange(batch, device=device) * self.size + (0 if self.offset is None else self.offset)
        token = torch.arange(self.tokens, device=device)
        end = torch.full_like(first, self.tokens) if self.lengths is None else self.lengths
        return (first[:, None] + token).flatten(), token < end[:, None]

    def last(self, batch: int, device: torch.device) -> Tensor:
        """Grid position `[B]` of each row's last token (its first position for a row without tokens)."""
        end = torch.full((batch,), self.tokens, device=device) if self.lengths is None else self.lengths
        end = end if self.offset is None else end + self.offset
        return (end - 1).clamp(min=0)

    def true_levels(self, batch: int, device: torch.device) -> Tensor:
        """The level `[B, levels]` in the sequence of each of the grid's levels."""
        table = torch.arange(self.levels, device=device).expand(batch, -1)
        if self.position is None or self.levels <= self.edge + 1:
            return table
        crossing = self.edge + trailing_zeros((self.position >> self.edge) + 1) + 1
        return torch.where(table > self.edge, crossing[:, None], table)

    def old_levels(self, batch: int, device: torch.device, count: int) -> tuple[Tensor, Tensor]:
        """Levels at which this call's tokens see the buckets of the initial state of `count` levels.

        Returns `[B, T, count]`, and `[B, count]` for each row's last token. The last level never changes its slot:
        what is merged into it has no level of its own any more.
        """
        position = torch.zeros(batch, dtype=torch.int64, device=device) if self.position is None else self.position
        slot = torch.arange(count, device=device)
        start = bucket_start(position[:, None], slot)  # [B, count]
        end = self.tokens if self.lengths is None else self.lengths
        last = (position + end - 1).clamp(min=0)[:, None]
        token = position[:, None] + torch.arange(self.tokens, device=device)
        # A bucket is never seen below its own slot; this matters only for slots that are still to be filled.
        seen, final = level(token[:, :, None], start[:, None]).maximum(slot), level(last, start).maximum(slot)
        fixed = slot == count - 1
        return tuple(torch.where(fixed, count - 1, x.clamp(max=count - 1)) for x in (seen, final))  # type: ignore


def make_grid(tokens: int, position: Tensor | None, lengths: Tensor | None, chunk: int = CHUNK) -> Grid:
    """The grid for rows of `tokens` that continue at `position [B]`, in chunks of at most `chunk`."""
    edge = max(tokens - 1, 0).bit_length()
    offset = None
    size = tokens
    if position is not None:
        offset = position & ((1 << edge) - 1)
        if offset.device.type == "cpu":  # values are at hand: no larger grid than needed, and often no offset at all
            size = tokens + int(offset.max())
            offset = offset if size > tokens else None
        else:
            size = tokens + (1 << edge) - 1
    chunk = min(chunk, 1 << (max(size, 1) - 1).bit_length())
    return Grid(tokens, chunk, -(-size // chunk), edge, position, offset, lengths)


def depth(chunks: int) -> int:
    """Levels of a tree over `chunks` chunks."""
    return max(chunks - 1, 0).bit_length()
