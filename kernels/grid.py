"""The chunk grid: rows of tokens padded to whole chunks, aligned so that levels can be read off positions in the grid.

Levels depend on a token's position in its sequence. A row that continues a sequence at position `p` is therefore put
at offset `p mod 2 ** e` of the grid, `2 ** e >= T`. Within the grid, levels then come out right, except for pairs
on either side of grid position `2 ** e`: all these pairs of a row have one level, which depends on `p`; the weight
of the grid's top level is exchanged for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from llcompile.kernels.levels import bucket_start, level, level_count, trailing_zeros

# Near the optimum between work inside chunks (grows with the size) and between them (shrinks). Without a correction and
# without levels, what is between chunks is cheapest, so those do best with less inside.
CHUNK = 64
SHORT_CHUNK = 32


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

    def place(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """`[B, T, A, ...] -> [B, A, N * C, ...]`, contiguous, 0 where there is no token."""
        return cast(Tensor, _Placed.apply(x, self, dtype))

    def _place(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        out = torch.empty(x.shape[0], x.shape[2], self.size, *x.shape[3:], dtype=dtype, device=x.device)
        if self.offset is None and self.lengths is None:
            out[:, :, : self.tokens].copy_(x.movedim(1, 2))
            out[:, :, self.tokens :].zero_()
        else:
            index, real = self._sources()
            moved = x.flatten(0, 1).index_select(0, index).unflatten(0, (x.shape[0], self.size))
            out.copy_(torch.where(real[(...,) + (None,) * (x.dim() - 2)], moved, 0).movedim(1, 2))
        return out

    def take(self, x: Tensor) -> Tensor:
        """Adjoint of `place`: `[B, A, N * C, ...] -> [B, T, A, ...]`, 0 where a token does not count."""
        x = x.movedim(1, 2)
        if self.offset is None and self.lengths is None:
            return x[:, : self.tokens]
        index, real = self._targets()
        moved = x.flatten(0, 1).index_select(0, index).unflatten(0, (x.shape[0], self.tokens))
        return torch.where(real[(...,) + (None,) * (x.dim() - 2)], moved, 0)

    def _sources(self) -> tuple[Tensor, Tensor]:
        """For each grid position, the flat index of its token, and whether there is one."""
        some = self.offset if self.offset is not None else self.lengths
        assert some is not None
        base = torch.arange(some.shape[0], device=some.device)[:, None] * self.tokens
        token = torch.arange(self.size, device=some.device) - (0 if self.offset is None else self.offset[:, None])
        token = token.expand(some.shape[0], -1)
        end = self.tokens if self.lengths is None else self.lengths[:, None]
        real = (token >= 0) & (token < end)
        return (base + token.clamp(0, self.tokens - 1)).flatten(), real

    def _targets(self) -> tuple[Tensor, Tensor]:
        """For each token, the flat index of its grid position, and whether it counts."""
        some = self.offset if self.offset is not None else self.lengths
        assert some is not None
        base = torch.arange(some.shape[0], device=some.device)[:, None] * self.size
        token = torch.arange(self.tokens, device=some.device)
        place = base + token + (0 if self.offset is None else self.offset[:, None])
        real = torch.ones_like(place, dtype=torch.bool) if self.lengths is None else token < self.lengths[:, None]
        return place.flatten(), real

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


class _Placed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
        ctx.grid, ctx.dtype = grid, x.dtype
        return grid._place(x, dtype)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return ctx.grid.take(d).to(ctx.dtype), None, None


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
