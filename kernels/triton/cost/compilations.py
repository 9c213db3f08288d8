"""How many kernels Triton compiles over a set of lengths, by its own keys and without a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

from llcompile.errors import KernelError
from llcompile.kernels.triton.chips import DEFAULT, Chip
from llcompile.kernels.triton.cost.around import around
from llcompile.kernels.triton.cost.case import Case
from llcompile.kernels.triton.launch import Kernel, Launch, options_of
from llcompile.kernels.triton.limits import interpreted

# Lengths that differ in all that Triton looks at: 1, multiples of 16 and odd numbers of tokens, chunks and pairs.
LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 128, 129, 640, 1000, 1024, 1025, 1088, 2048, 2049, 3333, 4096)


def compilations(case: Case, lengths: Iterable[int] = LENGTHS) -> dict[str, int]:
    """Compilations of each kernel of `case` over sequences of `lengths`, all with the level weights of `case`.

    Raises:
        KernelError: Triton's interpreter is on, which compiles nothing.
    """
    if interpreted():
        raise KernelError("compilations cannot be counted while TRITON_INTERPRET is set; unset it")
    found: set[tuple[Any, ...]] = set()

    def see(launch: Launch) -> None:
        found.add((launch.kernel.name, launch.kernel.code, launch.kernel.default, key_of(launch)))

    for length in lengths:
        around(dataclasses.replace(case, length=length).runner("meta"), see)
    names = [name for name, *_ in found]
    return {name: names.count(name) for name in sorted(set(names))}


def key_of(launch: Launch, chip: Chip = DEFAULT) -> tuple[Any, ...]:
    """What Triton knows of each argument when it compiles: its type, and whether it is 1 or a multiple of 16."""
    kernel = launch.kernel
    _, specialization, _ = _binder(kernel, chip)(*launch.arguments, **options_of(kernel.default, kernel.tiled))
    return tuple(specialization)


@cache
def _binder(kernel: Kernel, chip: Chip) -> Callable[..., Any]:
    """As `JITFunction.create_binder` makes it, which asks for the device that is there."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget(chip.backend, chip.arch, chip.warp))
    function = kernel.code.function
    binder: Callable[..., Any] = create_function_from_signature(function.signature, function.params, backend)
    return binder
