"""One call of the operator by Triton kernels: buffers, arguments and launches. The passes are in :mod:`.engine`."""

from __future__ import annotations

import dataclasses
import inspect
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..grid import Grid, make_grid
from ..layout import Layout, Operands
from ..state import linear_state, position_of
from ..tree import depth
from . import cache
from .chips import chip_of
from .description import Description, describe
from .source import generate
from .tuning import tuning


@lru_cache(maxsize=512)
def module_of(d: Description) -> ModuleType:
    """The imported file with the kernels of ``d``; raises KernelCacheError if it cannot be written."""
    family = f"{d.decay}_{d.correction}_{'log_linear' if d.weighted else 'linear'}"
    return cache.load(cache.file_of(generate(d), family))


@lru_cache(maxsize=4096)
def parameters(module: ModuleType, kernel: str) -> tuple[str, ...]:
    """Names of a kernel's parameters, in order."""
    return tuple(inspect.signature(getattr(module, kernel).fn).parameters)


class Call(Layout):
    """The operands of one call as the kernels see them; lanes are what :class:`Layout` folds every head into.

    ``values`` holds an argument for every parameter name that any kernel has; a launch picks its own by name.
    """

    def __init__(self, x: Operands, scale: float, final_state: bool) -> None:
        # Not Layout's own: it would copy the operands onto the grid, where the kernels read them from where they are.
        self.x, self.scale = x, scale
        self.d = describe(x, final_state)
        self.dtype = torch.float32
        self.batch, self.tokens, self.heads, self.value_dim = x.v.shape
        self.key_dim, self.lanes = x.q.shape[3], self.batch * self.heads
        self.levels, self.fold = self.d.levels, (self.heads, 1)
        self.empty = x.v.numel() == 0 or x.q.numel() == 0
        if self.empty:
            return
        self.module = module_of(self.d)
        self.chip = chip_of(x.v.device)
        self.grid = self._make_grid()
        self.chunks = self.grid.chunks
        self.depth = depth(self.chunks)
        self.values: dict[str, Any] = {
            "scale": scale,
            "heads": self.heads,
            "tokens": self.tokens,
            "chunks": self.chunks,
            "lanes": self.lanes,
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
            x = x.expand(self.batch, self.tokens, self.heads)
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
        if self.d.padded:
            assert grid.lengths is not None
            self.values["lengths"] = grid.lengths.to(torch.int32)
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

    # -- launches -----------------------------------------------------------------------------------------------------

    def launch(self, kernel: str, programs: int, tiled: bool = False, **values: Any) -> None:
        """Run ``programs`` programs of ``kernel`` (times its value tiles), with ``values`` beside those of the call."""
        chosen = tuning(kernel, self.d, self.chip)
        known = {**self.values, **values, "VALUE_TILE": chosen.value_tile}
        arguments = [known[name] for name in parameters(self.module, kernel)]
        tiles = -(-self.value_dim // chosen.value_tile) if tiled else 1
        if programs:
            getattr(self.module, kernel)[(programs, tiles)](
                *arguments, num_warps=chosen.warps, num_stages=chosen.stages
            )
