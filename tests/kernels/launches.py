"""Launches without a GPU: what would be launched for given operands, and which compiled kernels that would take."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from llcompile.kernels.triton import autotune
from llcompile.kernels.triton.cost.compilations import key_of
from llcompile.kernels.triton.launch import Launch


def recorded(call: Callable[[], object]) -> list[Launch]:
    """The launches of `call`, none of which runs."""
    found: list[Launch] = []
    with autotune.handed_to(found.append):
        call()
    return found


def variants(launches: Iterable[Launch]) -> set[tuple[Any, ...]]:
    """What Triton compiles for them: a kernel each time that its key of types and known multiples is a new one.

    Descriptions whose kernels have the same text share what is compiled.
    """
    return {(launch.kernel.code, launch.kernel.name, launch.kernel.default, key_of(launch)) for launch in launches}
