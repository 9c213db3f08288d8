"""Generated kernels: the Triton and C++ sources of a model's mixers, and what compilers make of them."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from llcompile.kernels.description import Description
from llcompile.kernels.triton.chips import BACKENDS, DEFAULT, assumed
from llcompile.kernels.triton.limits import beyond
from llcompile.kernels.triton.show import source_of
from llcompile.look.mixer_look import MixerLook

# The target of C++ kernels.
CPU = "cpu"


@dataclass(frozen=True)
class GeneratedKernels:
    """The generated files for all mixers with the same kind of call.

    Args:
        description: the description that it is generated from.
        modules: the modules of these mixers.
        problem: why there are no Triton kernels, or "".
    """

    description: Description
    modules: tuple[str, ...]
    problem: str = ""
    _taken: dict[str, list[Any]] = field(default_factory=dict, compare=False, repr=False)
    _seconds: dict[str, float] = field(default_factory=dict, compare=False, repr=False)

    @property
    def name(self) -> str:
        """A name for a file: what tells most, and a hash of all of it."""
        d = self.description
        digest = hashlib.sha256(repr(d).encode()).hexdigest()[:6]
        kind = f"level{d.levels}" if d.weighted else "linear"
        return f"{d.decay}_{d.correction}_{kind}_k{d.key_dim}_v{d.value_dim}_{d.dtype_name}_{digest}"

    @property
    def source(self) -> str:
        """The Triton file for the kind of device that torch was built for; "" where there is none."""
        return "" if self.problem else source_of(self.description)

    @property
    def sources(self) -> dict[str, str]:
        """Target ("cpu", "cuda", "hip") -> the file for it, C++ or Triton; without the targets that have none."""
        from llcompile.kernels.cpp import show

        targets = () if self.problem else BACKENDS
        triton: dict[str, str] = {target: source_of(self.description, assumed(target)) for target in targets}
        return {CPU: show.source_of(self.description), **triton}

    def resources(self, chip: str) -> list[Any]:
        """Registers, shared memory and spilled bytes of each kernel on a chip: "sm_80", "sm_90", "sm_100", "gfx942".

        The kernels are compiled for it, which takes seconds each and needs Triton, but no such chip. Kept once done.
        For "cpu": the library that the C++ compiler makes for this machine, its size, and the compiler's flags.
        """
        if chip not in self._taken and (chip == CPU or not self.problem):
            start = time.perf_counter()
            self._taken[chip] = self._compile(chip)
            self._seconds[chip] = time.perf_counter() - start
        return self._taken.get(chip, [])

    def _compile(self, chip: str) -> list[Any]:
        if chip == CPU:
            from llcompile.kernels.cpp import show

            return list(show.resources(self.description))
        from llcompile.kernels.triton.check import reports

        return list(reports(self.description, chip))

    @property
    def compiled(self) -> dict[str, list[Any]]:
        """Chip -> what `resources` has found out so far."""
        return dict(self._taken)

    @property
    def seconds(self) -> dict[str, float]:
        """Chip -> how long `resources` took for it, with what it found compiled already."""
        return dict(self._seconds)


def kernels_of(mixers: Iterable[MixerLook]) -> tuple[GeneratedKernels, ...]:
    """One file for each kind of call."""
    served: dict[Description, list[str]] = {}
    for mixer in mixers:
        if mixer.call is not None:
            served.setdefault(mixer.call.description, []).append(mixer.name)
    problem = lambda d: beyond(d, DEFAULT) or ""  # noqa: E731
    return tuple(GeneratedKernels(d, tuple(dict.fromkeys(modules)), problem(d)) for d, modules in served.items())
