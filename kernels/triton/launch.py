"""One launch: a kernel with its arguments, to be run with launch parameters of any choice."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from types import ModuleType
from typing import Any

from llcompile.kernels import cache
from llcompile.kernels.triton.buffers import BUFFERS
from llcompile.kernels.triton.chips import Chip
from llcompile.kernels.triton.description import Description
from llcompile.kernels.triton.direct import Code
from llcompile.kernels.triton.limits import interpreted
from llcompile.kernels.triton.schedule import KERNELS
from llcompile.kernels.triton.source import generate, kernel_text
from llcompile.kernels.triton.tuning import Tuning, tuning


@lru_cache(maxsize=512)
def module_of(d: Description) -> ModuleType:
    """The imported file with the kernels of `d`; raises KernelCacheError if it cannot be written."""
    return cache.load(cache.file_of(generate(d), d.family))


# By name and text.
_codes: dict[tuple[str, str], Code] = {}


def code_of(d: Description, name: str) -> Code:
    """The code of a kernel, from the file of the first description that had it; raises as `module_of`."""
    key = name, kernel_text(d, name)
    if key not in _codes:
        # Threads that need it at once all get the one that is there first.
        _codes.setdefault(key, Code(getattr(module_of(d), name)))
    return _codes[key]


class Kernel:
    """What all launches of one kernel share; two are equal only if they are the same object."""

    def __init__(self, d: Description, name: str, chip: Chip) -> None:
        self.d, self.name, self.code = d, name, code_of(d, name)
        self.tiled, self.parameters = self.code.tiled, self.code.parameters
        # Columns of transitions, whose tiles follow those of the values.
        self.passing = d.key_dim if KERNELS[name].passing else 0
        self.default: Tuning = tuning(name, d, chip)


class Kernels(dict[str, Kernel]):
    """The kernels of one description for one chip by name, each made when it is first asked for.

    Raises KernelCacheError at once where their file cannot be written.
    """

    def __init__(self, d: Description, chip: Chip) -> None:
        super().__init__()
        self.d, self.chip, self.module = d, chip, module_of(d)
        self._buffers: dict[tuple[str, ...], tuple[str, ...]] = {}

    def __missing__(self, name: str) -> Kernel:
        self[name] = kernel = Kernel(self.d, name, self.chip)
        return kernel

    def buffers(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """The buffers that the kernels `names` take, each once; there are few sets of kernels that run together."""
        if names not in self._buffers:
            found = dict.fromkeys(p for name in names for p in self[name].parameters if p in BUFFERS)
            self._buffers[names] = tuple(found)
        return self._buffers[names]


@lru_cache(maxsize=512)
def kernels_of(d: Description, chip: Chip) -> Kernels:
    """The kernels of `d` for `chip`, the same object for all calls of this process; the interpreter has no chip."""
    return Kernels(d if interpreted() else d.on(chip), chip)


class Launch:
    """A kernel with its arguments.

    `programs` is the grid's first size. The second is how many value tiles there are in `columns` (1 where it is 0,
    for kernels that walk over the values themselves), and in the columns of a transition where the kernel has those.
    """

    __slots__ = ("arguments", "columns", "kernel", "programs")

    def __init__(self, kernel: Kernel, known: Mapping[str, Any], programs: int, columns: int = 0) -> None:
        self.kernel, self.programs, self.columns = kernel, programs, columns
        self.arguments = [known[name] for name in kernel.parameters]

    def __call__(self, chosen: Tuning) -> None:
        """Run it."""
        code = self.kernel.code
        code.run(self._grid(chosen), self.arguments, chosen, options_of(chosen, code.tiled))

    def compiled(self, chosen: Tuning) -> Any:
        """Triton's compiled kernel for these arguments, without a run."""
        code = self.kernel.code
        options = options_of(chosen, code.tiled)
        return code.function.warmup(*self.arguments, grid=self._grid(chosen), **options)

    def _grid(self, chosen: Tuning) -> tuple[int, int, int]:
        tiles = -(-self.columns // chosen.value_tile) + -(-self.kernel.passing // chosen.value_tile)
        return self.programs, max(1, tiles), 1


@lru_cache(maxsize=512)
def options_of(chosen: Tuning, tiled: bool) -> dict[str, int]:
    """Launch parameters as Triton calls them."""
    tile = {"VALUE_TILE": chosen.value_tile} if tiled else {}
    return {**tile, "num_warps": chosen.warps, "num_stages": chosen.stages}
