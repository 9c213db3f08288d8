"""The functions of a family, compiled and loaded."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from llcompile.kernels.cpp.build import library
from llcompile.kernels.cpp.call import Call, Step
from llcompile.kernels.cpp.source import Family, family_of, generate
from llcompile.kernels.description import Description


class Functions(NamedTuple):
    """Entry points of a generated file; each gives 0, or what went wrong."""

    forward: Callable[[Call], int]
    backward: Callable[[Call], int]
    step: Callable[[Step], int]


def functions(d: Description) -> Functions:
    """The functions for a description; raises what `build.library` raises where they cannot be compiled."""
    return _load(family_of(d))


@cache
def _load(family: Family) -> Functions:
    loaded = library(generate(family), family.name)
    return Functions(*(_function(loaded, name, struct) for name, struct in _STRUCTS.items()))


_STRUCTS = {"forward": Call, "backward": Call, "step": Step}


def _function(loaded: ctypes.CDLL, name: str, struct: type[ctypes.Structure]) -> Any:
    function = loaded[name]
    function.argtypes, function.restype = [ctypes.POINTER(struct)], ctypes.c_int64
    return function
