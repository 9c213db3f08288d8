"""The chips that kernels are made for: what one program may take on each."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

import torch

Backend = Literal["cuda", "hip"]
BACKENDS: tuple[Backend, ...] = ("cuda", "hip")


class Chip(NamedTuple):
    """A kind of chip; `shared` is the bytes of shared memory (LDS) that one program may have."""

    name: str
    backend: Backend
    arch: int | str
    warp: int
    shared: int


# Shared memory per block: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability" (the opt-in
# maximum, 1 KB less than what a multiprocessor has); LDS per workgroup: AMD's ISA guides of CDNA 3 and CDNA 4.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("sm_80", "cuda", 80, 32, 163 * 1024),
        Chip("sm_86", "cuda", 86, 32, 99 * 1024),
        Chip("sm_89", "cuda", 89, 32, 99 * 1024),
        Chip("sm_90", "cuda", 90, 32, 227 * 1024),
        Chip("sm_100", "cuda", 100, 32, 227 * 1024),
        Chip("sm_120", "cuda", 120, 32, 99 * 1024),
        Chip("gfx942", "hip", "gfx942", 64, 64 * 1024),
        Chip("gfx950", "hip", "gfx950", 64, 160 * 1024),
    )
}
# What is assumed where there is no chip: Triton's interpreter, and descriptions that are only looked at.
DEFAULT = CHIPS["sm_90"]


@lru_cache(maxsize=64)
def chip_of(device: torch.device) -> Chip:
    """The chip behind `device`: a row of :data:`CHIPS`, or one made from what the driver tells."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return DEFAULT
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        name = properties.gcnArchName.split(":")[0]
        return CHIPS.get(name) or Chip(name, "hip", name, properties.warp_size, properties.shared_memory_per_block)
    arch = 10 * properties.major + properties.minor
    name = f"sm_{arch}"
    shared: int = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return CHIPS.get(name) or Chip(name, "cuda", arch, 32, shared)


def assumed(backend: Backend) -> Chip:
    """The chip that sources are shown for: the one that is here, or else one of its backend, sm_90 of CUDA's."""
    candidates = (chip_of(torch.device("cuda")), DEFAULT, *CHIPS.values())
    return next(chip for chip in candidates if chip.backend == backend)
