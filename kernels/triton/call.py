"""One call of the operator by Triton kernels: buffers, arguments and launches. The passes are in :mod:`.engine`."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from llcompile.kernels.grid import Grid, depth, make_grid
from llcompile.kernels.layout import Layout
from llcompile.kernels.operands import Operands
from llcompile.kernels.state import linear_state, position_of
from llcompile.kernels.triton import autotune
from llcompile.kernels.triton.chips import chip_of
from llcompile.kernels.triton.description import describe
from llcompile.kernels.triton.launch import Launch, kernels_of
from llcompile.kernels.triton.packing import PackedGrid, pack, packed_grid


class Call(Layout):
    """The operands of one call as the kernels see them; lanes are what :class:`Layout` folds every head into.

    ``values`` holds an argument for every parameter name that any kernel has; a launch picks its own by name.
    """

    def __init__(self, x: Operands, scale: float, final_state: bool) -> None:
        # Not Layout's own: it would copy the operands onto the grid, where the kernels read them from where they are.
        self.x, self.scale = x, scale
        self.d = describe(x, final_state)
        self.dtype = torch.float32
        self.batch, (_, self.tokens, self.heads, self.value_dim) = x.rows, x.v.shape
        self.key_dim, self.lanes = x.q.shape[3], self.batch * self.heads
        self.chunk_lanes = self.heads if self.d.packed else self.lanes  # of buffers that have an entry a chunk
        self.levels, self.fold = self.d.levels, (self.heads, 1)
        self.empty = x.v.numel() == 0 or x.q.numel() == 0
        if self.empty:
            return
        self.kernels = kernels_of(self.d, chip_of(x.v.device))
        self.grid = self._make_grid()
        self.chunks = self.grid.chunks
        self.depth = depth(self.chunks)
        self.values: dict[str, Any] = {
            "scale": scale,
            "heads": self.heads,
            "tokens": self.tokens,
            "chunks": self.chunks,
            "lanes": self.chunk_lanes,
        }
        self._add_operands()
        self._add_geometry()
        self._add_old()

    # -- arguments ----------------------------------------------------------------------------------------------------

    def _make_grid(self) -> Grid:
        position = None
        if self.d.continued:
            assert self.x.initial_state is not None
            position = position_of(self.x.initial_state)
        if self.x.starts is not None:
            assert self.x.lengths is not None
            return packed_grid(self.tokens, self.x.starts, self.x.lengths, position, self.d.chunk)
        grid = make_grid(self.tokens, position, self.x.lengths, self.d.chunk)
        offset = grid.offset
        if position is not None and offset is None:
            offset = torch.zeros_like(position)
        return dataclasses.replace(grid, chunk=self.d.chunk, chunks=-(-grid.size // self.d.chunk), offset=offset)

    def operand(self, name: str, x: Tensor | None) -> None:
        """Arguments of an operand ``[B, T, H, ...]`` (``[H]`` counts as the same for all tokens)."""
        if x is None:
            return
        if x.dim() == 1:
            x = x.expand(self.x.v.shape[:3])
        elif x.dim() == 4 and x.stride(3) != 1 and x.shape[3] > 1:
            x = x.contiguous()
        self.values |= {
            f"{name}_ptr": x,
            f"{name}_row": x.stride(0),
            f"{name}_token": x.stride(1),
            f"{name}_head": x.stride(2),
        }

    def _add_operands(self) -> None:
        x = self.x
        self.operand("query", x.q)
        self.operand("key", x.k)
        self.operand("value", x.v)
        self.operand("weight", x.level_weights)
        self.operand("decay", x.log_decay)
        self.operand("beta", x.beta)

    def _add_geometry(self) -> None:
        grid = self.grid
        if grid.lengths is not None:
            self.values["lengths"] = grid.lengths.to(torch.int32)
        if isinstance(grid, PackedGrid):
            self.values |= {"starts": grid.starts.to(torch.int32), **pack(grid)._asdict()}
        if self.d.continued:
            assert grid.offset is not None
            assert self.d.levels is not None
            served = self._level_index()
            self.values |= {
                "offsets": grid.offset.to(torch.int32),
                "served_levels": served.to(torch.int32).contiguous(),
                "grid_levels": served.shape[1],
            }

    def _add_old(self) -> None:
        """The initial state: as it is for the linear operator, else level by level as the first token sees it."""
        s = self.x.initial_state
        if s is None:
            return
        if not self.d.weighted:
            self.values["initial_states"] = linear_state(s).float().contiguous()
            return
        old = self._old_states()
        assert old is not None
        seen = self._old_index()[0][..., self._old_slots().start :]
        self.values |= {
            "old_states": old.contiguous(),
            "old_seen": seen.to(torch.int32).contiguous(),
            "old_slots": old.shape[1],
        }

    def with_tokens(self, grad_state: Tensor) -> Tensor:
        """The part of a final state's gradient that goes through the operator: rows without tokens have none."""
        if self.x.lengths is None:
            return grad_state
        return torch.where(self._without_tokens(grad_state), 0, grad_state)

    # -- buffers ------------------------------------------------------------------------------------------------------

    def buffer(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Room for what a kernel writes, known to later kernels by ``name``."""
        x = torch.empty(shape, dtype=dtype, device=self.x.v.device)
        self.values[name] = x
        return x

    def zeros(self, name: str, *shape: int) -> Tensor:
        """As :meth:`buffer`, filled with 0, fp32."""
        return self.buffer(name, *shape).zero_()

    def chunk_buffer(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """As :meth:`buffer`, with an entry of ``shape`` for each chunk."""
        return self.buffer(name, self.chunk_lanes, self.chunks, *shape, dtype=dtype)

    # -- launches -----------------------------------------------------------------------------------------------------

    def launch_chunks(self, kernel: str, tiled: bool = False) -> None:
        """Run ``kernel`` with a program for each chunk."""
        self.launch(kernel, self.chunk_lanes * self.chunks, tiled)

    def launch_pairs(self, kernel: str, level: int, tiled: bool = False) -> None:
        """Run ``kernel`` with a program for each pair of blocks of ``2 ** level`` chunks."""
        pairs = self.chunks >> (level + 1)
        if self.d.packed:  # a sequence's last pair may end where no whole pair of all chunks does
            pairs = -(-self.chunks // (2 << level))
        self.launch(kernel, self.chunk_lanes * pairs, tiled, pairs=pairs, level=level)

    def launch(self, kernel: str, programs: int, tiled: bool = False, **values: Any) -> None:
        """Run ``programs`` programs of ``kernel`` (times its value tiles), with ``values`` beside those of the call."""
        known = {**self.values, **values} if values else self.values
        autotune.run(Launch(self.kernels[kernel], known, programs, self.value_dim if tiled else 0))
