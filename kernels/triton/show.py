"""Reading what is generated: the source of a description, its kernels one by one, what they take, the files on disk."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING

from llcompile.kernels import cache, description
from llcompile.kernels.triton.chips import Chip, assumed
from llcompile.kernels.triton.description import Description
from llcompile.kernels.triton.schedule import KERNELS
from llcompile.kernels.triton.source import generate

if TYPE_CHECKING:
    from llcompile.kernels.triton.check import Report


def source_of(d: description.Description, chip: Chip | None = None) -> str:
    """The file with all kernels of `d`, as it is run on `chip` (default: see `chips.assumed`)."""
    found = Description.of(d)
    return generate(found.on(chip or assumed(found.backend)))


def kernels_in(source: str) -> dict[str, str]:
    """The text of each kernel in a generated file by name, in the order in which they run."""
    lines = source.splitlines(keepends=True)
    functions = {n.name: n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef)}
    return {
        name: "".join(lines[functions[name].decorator_list[0].lineno - 1 : functions[name].end_lineno])
        for name in KERNELS
        if name in functions
    }


def resources(d: description.Description, chip: str, kernels: tuple[str, ...] | None = None) -> list[Report]:
    """Registers, shared memory, spilled bytes and matrix instructions of the kernels of `d` (all, or those named).

    They are compiled for `chip` (a key of :data:`.chips.CHIPS`), which need not be there; that takes seconds each.
    Raises what Triton raises where a kernel cannot be compiled.
    """
    from llcompile.kernels.triton.check import reports  # the one part that needs Triton

    return list(reports(d, chip, kernels))


def keep(d: description.Description, folder: Path, chip: Chip | None = None) -> Path:
    """Write what `source_of` gives to `folder`; raises KernelCacheError if that cannot be written."""
    return cache.file_of(source_of(d, chip), d.family, folder)


def files() -> list[cache.File]:
    """The generated files in the cache folder, by name; files of another origin are passed over."""
    return cache.files(".py", "Description(")
