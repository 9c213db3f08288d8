"""Generated C++ as a loaded library: compiled once, kept in the folder of generated files, checked before it is loaded.

A library's name holds a hash of all that it depends on (`compiler.Compiler.key`) and then one of its content, so that a
damaged one is seen, and two processes that compile at once leave the other's whole. Where the file system has locks,
the second one waits and takes what the first has made.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess
import tempfile
import threading
import time
from pathlib import Path

from llcompile.errors import CompilerError
from llcompile.kernels import cache, progress
from llcompile.kernels.cpp.compiler import Compiler, find

_locks: dict[str, threading.Lock] = {}
_loaded: dict[str, ctypes.CDLL] = {}
_failed: dict[str, str] = {}
if hasattr(os, "register_at_fork"):  # a thread that held one does not exist in the child
    os.register_at_fork(after_in_child=_locks.clear)


def library(source: str, name: str) -> ctypes.CDLL:
    """The library compiled from `source`, loaded once per process; `name` begins the names of its files.

    Raises:
        CompilerError: there is no compiler, or it fails, now or before in this process; or the library cannot be
            loaded.
        KernelCacheError: the folder for generated files cannot be written, or is not this user's alone.
    """
    compiler = find()
    key = f"{name}_{compiler.key(source)}"
    with _locks.setdefault(key, threading.Lock()):
        if key in _failed:
            raise CompilerError(_failed[key])
        if key not in _loaded:
            _loaded[key] = _load(key, source, name, compiler)
        return _loaded[key]


# The headers that generated sources include, and what they need of libraries.
_TRIVIAL = """#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
extern "C" int threads() { return at::get_num_threads(); }
"""


def check() -> None:
    """Compile a file that includes what generated ones do, and load it; raises as `library`."""
    library(_TRIVIAL, "check").threads()


def path_of(source: str, name: str) -> Path:
    """Where the library compiled from `source` is; raises as `library`."""
    compiler = find()
    key = f"{name}_{compiler.key(source)}"
    with _locks.setdefault(key, threading.Lock()):
        return _on_disk(key) or _made(key, source, name, compiler)


def _load(key: str, source: str, name: str, compiler: Compiler) -> ctypes.CDLL:
    try:
        return _opened(_on_disk(key) or _made(key, source, name, compiler))
    except CompilerError as error:
        _failed[key] = str(error)
        raise


def _on_disk(key: str) -> Path | None:
    """The library that is there, if its content is what it was."""
    if cache.folder().is_dir():
        cache.check_folder(cache.folder())
    found = sorted(cache.folder().glob(f"{key}_*.so"))
    return next((path for path in found if cache.is_whole(path)), None)


def _made(key: str, source: str, name: str, compiler: Compiler) -> Path:
    """The library, compiled by this process, or by another one while this one waited for it."""
    text = cache.file_of(source, name, suffix=".cpp")
    with cache.turn(text.parent / f".{key}.lock"):
        found = _on_disk(key)
        if found is not None:
            return found
        progress.say(f"compiling the C++ kernels {text.name}, once for this machine ...")
        started = time.perf_counter()
        content = compiled(text, compiler)
        progress.say(f"compiled {text.name} in {time.perf_counter() - started:.0f} s")
        path = text.parent / f"{key}_{cache.content_hash(content)}.so"
        cache.write(path, content)
        return path


def compiled(source: Path, compiler: Compiler) -> bytes:
    """The content of the library that `compiler` makes of a file; raises `CompilerError` if it makes none."""
    try:
        with tempfile.TemporaryDirectory(prefix="llcompile_") as place:
            target = Path(place) / "library.so"
            command = compiler.arguments(source, target)
            done = subprocess.run(command, capture_output=True, text=True, errors="replace")
            if done.returncode == 0:
                return target.read_bytes()
    except (OSError, ImportError) as error:
        raise CompilerError(f"the C++ compiler {shlex.join(compiler.command)} could not be run: {error}") from error
    raise CompilerError(
        f"the C++ compiler failed with exit code {done.returncode}: {_reason(done.stderr)}. The source is {source}, "
        f"the command: {shlex.join(command)}"
    )


def _reason(listing: str) -> str:
    """The line of a compiler's listing that tells most: the first error, or else the last line."""
    lines = [line.strip() for line in listing.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[-1] if lines else "it says nothing")[:300]


def _opened(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise CompilerError(
            f"the compiled library cannot be loaded ({error}); if programs must not run from {path.parent}, set the "
            f"environment variable {cache.FOLDER_VARIABLE} to another folder"
        ) from error
