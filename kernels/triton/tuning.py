"""How each kernel is launched: the width of its value tile, its warps and its pipeline stages."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from llcompile.kernels.triton.chips import Chip
from llcompile.kernels.triton.description import LEAST_TILE, Description
from llcompile.kernels.triton.measured import fastest
from llcompile.kernels.triton.schedule import DECODE, KERNELS


class Tuning(NamedTuple):
    """Launch parameters of one kernel."""

    value_tile: int
    warps: int
    stages: int


def _small_products(d: Description, chip: Chip) -> bool:
    """Matrix instructions of one warp, whose operands and sums all lie in registers (before and beside wgmma)."""
    return isinstance(chip.arch, int) and chip.arch // 10 in (8, 12)


# What differs from `schedule.KERNELS`, and where: the first row whose condition holds.
_EXCEPTIONS: tuple[tuple[str, Callable[[Description, Chip], bool], tuple[int, int, int]], ...] = (
    ("tree_up", lambda d, chip: d.dense, (32, 8, 1)),
    # The loop over values, if it had one turn only, would be unrolled into everything around it.
    ("read_gradient", lambda d, chip: d.dense and d.key_dim > 64 >= d.value_dim, (32, 8, 1)),
    ("chunk_gradient", lambda d, chip: d.decay == "channel" and not d.delta, (128, 4, 1)),
    ("chunk_values_gradient", _small_products, (16, 4, 1)),
)


def _half_empty(kernel: str, d: Description) -> bool:
    """With a tile of 64 columns this kernel spills on sm_90; with one of 128, half of it empty, it does not."""
    return kernel == "chunk_state" and d.decay == "channel" and d.delta and 32 < d.value_dim <= 64 < d.key_dim


# Kernels in whose products only states have a value axis, which are fp32; they have products for the delta rule alone.
_OF_STATES = frozenset({"tree_up", "state_scan", "scan_gradient", "final_state_gradient"})
_SCANS = frozenset({"state_scan", "scan_gradient"})


def narrowest(kernel: str, d: Description) -> int:
    """The narrowest value tile that `kernel` may have; see `description.Description.on`.

    The scans of wide keys keep theirs: on an H200 they were right with it at K = V = 128, and wider ones spill.
    """
    if d.rated:
        return 1
    if kernel in DECODE or (kernel in _OF_STATES and not d.dense) or (kernel in _SCANS and d.key_dim > 64):
        return LEAST_TILE
    return d.least_tile(torch.float32 if kernel in _OF_STATES else d.dtype)


# Most warps of a program. A warp of AMD's has 64 threads, and 4 of them may have 512 registers a thread.
_MOST_WARPS = {"cuda": 8, "hip": 4}


def tuning(kernel: str, d: Description, chip: Chip) -> Tuning:
    """Launch parameters of `kernel` for `d` on `chip`: as measured, else by rule."""
    rules = (launch for name, holds, launch in _EXCEPTIONS if name == kernel and holds(d, chip))
    widest, warps, stages = fastest(kernel, d, chip) or next(rules, KERNELS[kernel].launch)
    warps = min(warps, _MOST_WARPS[chip.backend])
    if d.rated:
        return Tuning(min(max(widest // d.key_tile, 1), d.lanes), warps, stages)
    columns = d.value_tile * (2 if _half_empty(kernel, d) else 1)
    return Tuning(min(max(widest, narrowest(kernel, d)), columns), warps, stages)
