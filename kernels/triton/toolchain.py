"""What kernels are compiled with here: Triton and the assembler that it calls."""

from __future__ import annotations

import importlib.metadata
import re
from functools import lru_cache
from typing import NamedTuple

import torch

from llcompile.kernels.triton.chips import Chip, chip_of

Version = tuple[int, ...]


class Toolchain(NamedTuple):
    """The chip, Triton's version, and that of ptxas (None where another assembler is used)."""

    chip: Chip
    triton: Version
    ptxas: Version | None

    def __str__(self) -> str:
        assembler = "" if self.ptxas is None else f", ptxas {text(self.ptxas)}"
        return f"{self.chip.name}, Triton {text(self.triton)}{assembler}"


@lru_cache(maxsize=64)
def toolchain_of(device: torch.device) -> Toolchain:
    """What makes kernels for `device`; raises ImportError where there is no Triton."""
    chip = chip_of(device)
    return Toolchain(chip, version(importlib.metadata.version("triton")), _ptxas(chip))


def version(found: str) -> Version:
    """`3.7.1+git1234` as (3, 7, 1)."""
    numbers = re.match(r"\d+(?:\.\d+)*", found)
    return tuple(map(int, numbers[0].split("."))) if numbers else ()


def text(found: Version) -> str:
    """The other way."""
    return ".".join(map(str, found))


def _ptxas(chip: Chip) -> Version | None:
    """The version of the assembler that Triton calls for `chip`; newer ones come with some releases."""
    if not isinstance(chip.arch, int):
        return None
    try:
        from triton.backends.nvidia.compiler import get_ptxas

        return version(str(get_ptxas(chip.arch).version))
    except Exception:  # whatever a Triton raises that has moved it: then only its own version tells
        return None
