"""The file with the Triton kernels of per-level readouts, from a description to the imported module."""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType

from llcompile.kernels import cache, header
from llcompile.kernels.description import ReadoutDescription
from llcompile.kernels.triton.description import BACKEND, tile
from llcompile.kernels.triton.source import template

# Tokens of a chunk: inside, a product of matrices makes a score for each pair of them.
CHUNK = 32
KERNELS = ("chunk_sums", "readouts", "node_readers", "readouts_gradient", "readouts_step")


def warps(kernel: str) -> int:
    """The warps of a program; a step has one tile `[L, R]`."""
    return 1 if kernel == "readouts_step" else 4


def generate(d: ReadoutDescription) -> str:
    """The source of the kernels for `d`."""
    dtype = str(d.dtype).removeprefix("torch.")
    return template("readouts").render(
        levels=d.levels,
        level_tile=tile(d.levels, 1),
        channels=d.channels,
        channel_tile=tile(d.channels),
        chunk=CHUNK,
        edge=CHUNK.bit_length() - 1,
        digits=header.DIGITS,
        digit_bits=header.BITS,
        dtype=dtype,
        precision="ieee" if BACKEND == "hip" else "tf32x3" if dtype == "float32" else "tf32",
    )


@lru_cache(maxsize=64)
def module_of(d: ReadoutDescription) -> ModuleType:
    """The imported file with the kernels of `d`; raises KernelCacheError if it cannot be written."""
    return cache.load(cache.file_of(generate(d), f"readouts_{d.levels}_{d.channels}"))
