"""The C++ compiler: which one is called, with which flags, and what a compiled library depends on."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from llcompile.errors import CompilerError

# The environment variable that names a compiler; Inductor reads it, too.
VARIABLE = "CXX"


class _Platform(NamedTuple):
    names: tuple[str, ...]  # of compilers, in the order in which they are tried: Inductor's first
    flags: tuple[str, ...]
    install: str


# Infinities and NaN mean something here: nothing of -ffast-math.
_COMMON = ("-O3", "-std=c++17", "-fPIC", "-shared", "-ffp-contract=fast")
_PLATFORMS = {
    "linux": _Platform(("g++", "clang++", "c++"), (*_COMMON, "-fopenmp"), "apt-get install g++"),
    # Without OpenMP, which Apple's compiler has no headers for, ATen's parallel_for runs on one thread.
    "darwin": _Platform(("clang++", "g++"), _COMMON, "xcode-select --install"),
}
# Left out where a compiler does not know it.
_NATIVE = "-march=native"
_PLACES = {"flags", "features"}  # what /proc/cpuinfo calls the instruction sets, on x86 and on Arm


class Compiler(NamedTuple):
    """A compiler that runs: its command, what it says about its version, and the flags that it takes."""

    command: tuple[str, ...]
    version: str
    flags: tuple[str, ...]

    def arguments(self, source: Path, target: Path) -> list[str]:
        """The command that makes the library `target` from `source`."""
        from torch.utils import cpp_extension  # imports setuptools: only now

        include = (f"-I{place}" for place in cpp_extension.include_paths())
        places = [Path(place) for place in cpp_extension.library_paths()]
        libraries = (f"-L{place}" for place in places)
        named = (*include, str(source), "-o", str(target), *_openmp(places), *libraries, "-ltorch_cpu", "-lc10")
        return [*self.command, *self.flags, *named]

    def key(self, source: str) -> str:
        """What a library depends on, as a short hash: source, compiler, flags, torch and the CPU's instructions."""
        parts = (source, self.version, self.flags, torch.__version__, platform.machine(), _cpu())
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _openmp(places: list[Path]) -> list[str]:
    """The OpenMP library that torch brings, before the compiler's own: a second one would not know torch's threads."""
    return [str(path) for place in places for path in sorted(place.glob("libgomp*.so*"))][:1]


def unsupported() -> str | None:
    """Why there are no C++ kernels on this platform; None if there are."""
    return None if sys.platform in _PLATFORMS else f"they are compiled on {' and '.join(_PLATFORMS)} only"


def find() -> Compiler:
    """The compiler that `CXX` names, or else the first that is installed.

    Raises:
        CompilerError: there is none, or it does not run, or there are no flags for this platform.
    """
    reason = unsupported()
    if reason is not None:
        raise CompilerError(f"C++ kernels cannot be compiled here: {reason}")
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return _compiler(tuple(shlex.split(chosen)))
    name = next((name for name in _PLATFORMS[sys.platform].names if shutil.which(name)), None)
    if name is None:
        raise CompilerError(f"no C++ compiler was found: {_advice()}")
    return _compiler((name,))


@lru_cache(maxsize=8)
def _compiler(command: tuple[str, ...]) -> Compiler:
    try:
        asked = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise CompilerError(f"the C++ compiler {shlex.join(command)} does not run ({error}): {_advice()}") from error
    flags = _PLATFORMS[sys.platform].flags
    return Compiler(command, asked.stdout.strip(), (*flags, _NATIVE) if _takes(command, _NATIVE) else flags)


def _takes(command: tuple[str, ...], flag: str) -> bool:
    """Whether a compiler knows a flag, asked with an empty file."""
    asked = subprocess.run([*command, flag, "-E", "-x", "c++", os.devnull], capture_output=True)
    return asked.returncode == 0


def _advice() -> str:
    install = _PLATFORMS[sys.platform].install
    return f"install one ({install}), or set the environment variable {VARIABLE} to a compiler for C++17"


@lru_cache(maxsize=1)
def _cpu() -> str:
    """The instruction sets of this CPU, as the system lists them; torch's word for them where it does not."""
    try:
        with Path("/proc/cpuinfo").open() as lines:
            listed = next((line for line in lines if line.partition(":")[0].strip().lower() in _PLACES), "")
    except OSError:
        listed = ""
    return f"{torch.backends.cpu.get_cpu_capability()} {listed.partition(':')[2].strip()}"
