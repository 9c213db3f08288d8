"""Launches without a GPU: what would be launched for given operands, and which compiled kernels that would take."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any
from unittest import mock

from llcompile.kernels.triton import autotune
from llcompile.kernels.triton.launch import Kernel, Launch


def recorded(call: Callable[[], object]) -> list[Launch]:
    """The launches of `call`, none of which runs."""
    found: list[Launch] = []
    with mock.patch.object(autotune, "run", found.append):
        call()
    return found


def variants(launches: Iterable[Launch]) -> set[tuple[Any, ...]]:
    """What Triton compiles for them: a kernel each time that its key of types and known multiples is a new one."""
    return {(launch.kernel.d, launch.kernel.name, launch.kernel.default, key_of(launch)) for launch in launches}


def key_of(launch: Launch) -> tuple[Any, ...]:
    """What Triton knows of each argument when it compiles: type, and whether it is 1 or a multiple of 16."""
    _, specialisation, _ = _binder(launch.kernel)(*launch.arguments, **launch._options(launch.kernel.default))
    return tuple(specialisation)


@cache
def _binder(kernel: Kernel) -> Callable[..., Any]:
    """As `JITFunction.run` makes it, for sm_90, where that asks for the device that is there."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    function = kernel.function
    binder: Callable[..., Any] = create_function_from_signature(
        function.signature, function.params, make_backend(GPUTarget("cuda", 90, 32))
    )
    return binder
