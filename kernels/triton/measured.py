"""Launches that were the fastest of those tried on a chip: value tile, warps and stages, by kernel.

Measured on an H200 in bfloat16, for decay per head, whole sequences, K and V of 64 and 128
(benchmarks/results/launches-cuda-2026-11-27.txt, made by `python -m benchmarks.launches`): each is within 4 % of the
fastest at all sizes where a launch takes 0.1 ms or more. Float16, no decay, other sizes up to 128, states and packed
sequences have the same tiles, and were not measured.

With 4 warps some kernels spill a few registers and are still faster than with 8, because two or three programs share a
multiprocessor. With several stages, a program loads the operands of its next turn while it works at this one.
"""

from __future__ import annotations

import torch

from llcompile.kernels.triton.chips import Chip
from llcompile.kernels.triton.description import Description

Launches = dict[str, tuple[int, int, int]]

_HOPPER = 90
_ALL: Launches = {
    "chunk_state": (128, 4, 1),
    "read_gradient": (128, 4, 1),
    "chunk_gradient": (128, 4, 1),
}
# By what a chunk does to a state: it decays, or is multiplied by a matrix.
_PLAIN: Launches = {
    **_ALL,
    "block_state": (128, 4, 2),
    "output": (128, 4, 1),
    "state_gradient": (64, 4, 3),
    "chunk_values_gradient": (64, 4, 1),
}
_DENSE: Launches = {
    **_ALL,
    "tree_up": (64, 4, 1),
    "delta_block_state": (64, 4, 2),
    "delta_block_output": (64, 4, 1),
    "output": (64, 4, 1),
    "state_gradient": (64, 4, 1),
    "transition_gradient": (128, 8, 3),
    "tree_down": (128, 4, 1),
    "transition_down": (64, 4, 1),
    "chunk_values_gradient": (128, 4, 1),
    "chunk_transition_gradient": (64, 4, 1),
    "chunk_reader_gradient": (128, 4, 1),
    "chunk_writer_gradient": (128, 4, 1),
    "chunk_delta_gradient": (128, 4, 1),
}


# What differs for K <= 64.
_NARROW: Launches = {"block_state": (64, 4, 3), "delta_block_state": (64, 4, 3)}


def fastest(kernel: str, d: Description, chip: Chip) -> tuple[int, int, int] | None:
    """The launch of `kernel` for `d` by measurement on chips of this kind; None where that says nothing."""
    if chip.arch != _HOPPER or d.dtype == torch.float32 or d.decay not in ("none", "scalar"):
        return None
    if d.correction == "erase" or not d.weighted or max(d.key_dim, d.value_dim) > 128:
        return None
    if d.key_dim <= 64 and kernel in _NARROW:
        return _NARROW[kernel]
    return (_DENSE if d.dense else _PLAIN).get(kernel)
