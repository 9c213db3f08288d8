"""The functions of a family, compiled and loaded."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch

from llcompile.kernels.cpp import readout_call
from llcompile.kernels.cpp.build import library
from llcompile.kernels.cpp.call import Call, Step
from llcompile.kernels.cpp.source import Family, family_of, generate, generate_readouts
from llcompile.kernels.description import Description


class Functions(NamedTuple):
    """Entry points of a generated file: each takes the struct for it, and gives 0, or what went wrong."""

    forward: Callable[[Any], int]
    backward: Callable[[Any], int]
    step: Callable[[Any], int]


def functions(d: Description) -> Functions:
    """The functions for a description; raises what `build.library` raises where they cannot be compiled."""
    return _load(family_of(d))


@cache
def _load(family: Family) -> Functions:
    return _functions(generate(family), family.name, _STRUCTS)


@cache
def readout_functions(sums: torch.dtype) -> Functions:
    """The functions of per-level readouts with sums in float32 or float64; raises as `functions`."""
    source, name = generate_readouts(sums)
    return _functions(source, name, _READOUT_STRUCTS)


_STRUCTS = {"forward": Call, "backward": Call, "step": Step}
_READOUT_STRUCTS = {"forward": readout_call.Call, "backward": readout_call.Call, "step": readout_call.Step}


def _functions(source: str, name: str, structs: Mapping[str, type[ctypes.Structure]]) -> Functions:
    loaded = library(source, name)
    return Functions(*(_function(loaded, entry, struct) for entry, struct in structs.items()))


def _function(loaded: ctypes.CDLL, name: str, struct: type[ctypes.Structure]) -> Any:
    function = loaded[name]
    function.argtypes, function.restype = [ctypes.POINTER(struct)], ctypes.c_int64
    return function
