"""The forward pass in blocks of chunks: one program walks over a block, and makes the states of its levels on the way.

Two passes over the tokens instead of one: the first makes a state for each block, the second those of its chunks, each
of which is read soon and then overwritten. Between the passes a tree joins blocks. So there are fewer states in memory
by the number of chunks in a block, and fewer programs: short calls have a program for each chunk (`engine`).

With the delta rule, the first pass also makes a block's transition, and the queries of its chunks as they read a state
at the block's start; states of levels above are taken there once a block. States inside pass each chunk as it comes,
by its keys: no chunk has a matrix [K, K].
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from llcompile.kernels.grid import Grid, depth
from llcompile.kernels.operands import Operands
from llcompile.kernels.triton.call import Call
from llcompile.kernels.triton.description import Description
from llcompile.kernels.triton.schedule import BLOCKS

# Chunks of a block. Twice as many would halve what is left of the states, and so would the programs be.
WALK = 16
# Programs without which a large chip (132 multiprocessors of an H100, two programs each) has no work for all of it.
LEAST_PROGRAMS = 256
_least_programs = ContextVar("least_programs", default=LEAST_PROGRAMS)


def may(d: Description) -> bool:
    """Whether the forward pass of long calls goes in blocks.

    What continues, ends in a state or is packed has tables for its chunks. For the delta rule in float32, tiles would
    be twice as large as those that were seen to fit on the chips.
    """
    if not d.weighted or d.correction == "erase" or d.decay not in ("none", "scalar"):
        return False
    if d.delta and d.dtype == torch.float32:
        return False
    return d.initial_state == "none" and not d.final_state and not d.packed


def serves(d: Description, rows: int, tokens: int, heads: int) -> bool:
    """Whether a call's forward pass goes in blocks."""
    blocks = tokens // (WALK * d.chunk)  # whole ones
    return may(d) and rows * heads * blocks >= _least_programs.get()


@contextmanager
def always() -> Iterator[None]:
    """Whatever `may` go in blocks does so inside, from one block on: what tests of these kernels need."""
    with _from(1):
        yield


@contextmanager
def never() -> Iterator[None]:
    """Nothing goes in blocks inside, for comparisons."""
    with _from(sys.maxsize):
        yield


@contextmanager
def _from(programs: int) -> Iterator[None]:
    before = _least_programs.set(programs)
    try:
        yield
    finally:
        _least_programs.reset(before)


def in_blocks(d: Description) -> Description:
    """What the kernels are made for."""
    return dataclasses.replace(d, walk=WALK)


def forward(x: Operands, scale: float) -> Tensor:
    """Output `[B, T, H, V]`."""
    call = BlockCall(x, scale, False)
    call.run(BLOCKS)
    found: Tensor = call.arguments["outputs"]
    return found


class BlockCall(Call):
    """A call whose buffers have an entry for each block where others have one for each chunk."""

    def _description(self, final_state: bool) -> Description:
        return in_blocks(super()._description(final_state))

    def _make_grid(self) -> Grid:
        grid = super()._make_grid()
        return dataclasses.replace(grid, chunks=-(-grid.chunks // WALK))

    def _sizes(self) -> dict[str, int]:
        blocks = self.grid.chunks
        of_blocks = {"LOW": self.d.low_levels, "N * WALK": blocks * WALK, "FAR": max(depth(blocks), 1)}
        return {**super()._sizes(), **of_blocks}

    def _add_geometry(self) -> None:
        super()._add_geometry()
        self.arguments["far_levels"] = self.arguments.sizes["FAR"]
