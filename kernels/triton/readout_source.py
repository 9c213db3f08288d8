"""The file with the Triton kernels of per-level readouts, from a description to the imported module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from types import ModuleType
from typing import Any

from llcompile.kernels import cache, header
from llcompile.kernels.description import ReadoutDescription
from llcompile.kernels.triton.description import BACKEND, tile
from llcompile.kernels.triton.direct import Code
from llcompile.kernels.triton.source import template

Run = Callable[[tuple[int, int, int], Sequence[Any]], None]  # (grid, arguments)
# Tokens of a chunk: inside, a product of matrices makes a score for each pair of them.
CHUNK = 32
# Chunks whose nodes a program makes, and the most channels of them: Triton 3.9 crashes on 128. At once it reads 16
# numbers for each thread of 4 warps, and 32 for the one node that may be large, where it has nothing else to wait for.
TILE, BLOCK = 32, 64
_NUMBERS, _SPAN_NUMBERS = 2048, 4096
# The warps of a program; a step has one tile `[L, R]`.
KERNELS = {
    "key_nodes": 4,
    "readouts": 4,
    "final_state": 4,
    "both_nodes": 4,
    "readouts_gradient": 4,
    "readouts_step": 1,
}
# Their parameters that are pointers, besides those whose names say so.
_BUFFERS = {
    *("starts", "lengths", "old_states", "states", "nodes", "outputs"),
    *("gradients", "node_gradients", "query_gradients", "key_gradients"),
}


def generate(d: ReadoutDescription) -> str:
    """The source of the kernels for `d`."""
    dtype, channel_tile = str(d.dtype).removeprefix("torch."), tile(d.channels)
    block = min(channel_tile, BLOCK)
    return template("readouts").render(
        levels=d.levels,
        level_tile=tile(d.levels, 1),
        channels=d.channels,
        channel_tile=channel_tile,
        chunk=CHUNK,
        edge=CHUNK.bit_length() - 1,
        tile=TILE,
        tile_bits=TILE.bit_length() - 1,
        block=block,
        group=_NUMBERS // (TILE * block),
        span=_SPAN_NUMBERS // block,
        digits=header.DIGITS,
        digit_bits=header.BITS,
        dtype=dtype,
        precision="ieee" if BACKEND == "hip" else "tf32x3" if dtype == "float32" else "tf32",
    )


@lru_cache(maxsize=64)
def module_of(d: ReadoutDescription) -> ModuleType:
    """The imported file with the kernels of `d`; raises KernelCacheError if it cannot be written."""
    return cache.load(cache.file_of(generate(d), f"readouts_{d.levels}_{d.channels}"))


@lru_cache(maxsize=64)
def kernels_of(d: ReadoutDescription) -> dict[str, Run]:
    """How to launch each kernel of `d`, by name; raises KernelCacheError if their file cannot be written."""
    module = module_of(d)
    return {
        name: partial(Code(getattr(module, name), _BUFFERS).run, chosen=warps, options={"num_warps": warps})
        for name, warps in KERNELS.items()
    }
