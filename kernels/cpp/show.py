"""Reading what is generated in C++: the source for a description, what the compiler makes of it, the files on disk."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from llcompile.kernels import cache
from llcompile.kernels.cpp import build, compiler
from llcompile.kernels.cpp.source import family_of, generate
from llcompile.kernels.description import Description


class Report(NamedTuple):
    """A compiled library: where it is, its size in bytes, and what made it."""

    path: Path
    size: int
    compiler: str
    flags: tuple[str, ...]


def source_of(d: Description) -> str:
    """The file that runs `d`, and every other description of its family."""
    return generate(family_of(d))


def resources(d: Description) -> list[Report]:
    """What the compiler makes of it, for this CPU; that takes seconds where it is not on disk yet.

    Raises what `build.library` raises.
    """
    found = compiler.find()
    path = build.path_of(source_of(d), family_of(d).name)
    return [Report(path, path.stat().st_size, found.version.splitlines()[0], found.flags)]


def keep(d: Description, folder: Path) -> Path:
    """Write what `source_of` gives to `folder`; raises KernelCacheError if that cannot be written."""
    return cache.file_of(source_of(d), family_of(d).name, folder, ".cpp")


def files() -> list[cache.File]:
    """The generated sources in the cache folder, by name; files of another origin are passed over."""
    return cache.files(".cpp", "// decay: ")
