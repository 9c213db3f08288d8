"""The forward pass in blocks of chunks: one program walks over a block, and makes the states of its levels on the way.

Two passes over the tokens instead of one: the first makes a state for each block, the second those of its chunks, each
of which is read soon and then overwritten. Between the passes a tree joins blocks. So there are fewer states in memory
by the number of chunks in a block, and fewer programs: short calls have a program for each chunk (`engine`).
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from llcompile.kernels.operands import Operands
from llcompile.kernels.triton.call import Call
from llcompile.kernels.triton.description import Description
from llcompile.kernels.triton.schedule import BLOCKS

# Chunks of a block. Twice as many would halve what is left of the states, and so would the programs be.
WALK = 16
# Programs without which a large chip (132 multiprocessors of an H100, two programs each) has no work for all of it.
LEAST_PROGRAMS = 256


def serves(d: Description, rows: int, tokens: int, heads: int) -> bool:
    """Whether a call's forward pass should go in blocks.

    The delta rule has a matrix for each chunk to keep, and what continues, ends in a state or is packed has tables for
    its chunks.
    """
    if not d.weighted or d.correction != "none" or d.decay not in ("none", "scalar"):
        return False
    if d.initial_state != "none" or d.final_state or d.packed:
        return False
    blocks = tokens // (WALK * d.chunk)  # whole ones
    return rows * heads * blocks >= LEAST_PROGRAMS


def forward(x: Operands, scale: float) -> Tensor:
    """Output `[B, T, H, V]`."""
    call = BlockCall(x, scale, False)
    call.run(BLOCKS)
    found: Tensor = call.arguments["outputs"]
    return found


class BlockCall(Call):
    """A call whose buffers have an entry for each block where others have one for each chunk."""

    def _description(self, final_state: bool) -> Description:
        return dataclasses.replace(super()._description(final_state), walk=WALK)

    def _sizes(self) -> dict[str, int]:
        blocks = -(-self.grid.chunks // WALK)
        self.grid = dataclasses.replace(self.grid, chunks=blocks)
        return {**super()._sizes(), "LOW": self.d.low_levels}
