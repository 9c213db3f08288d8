"""Generated files on disk: written once, checked when read, safe while other processes write the same ones.

A file's name holds the hash of its content, so two processes that write one write the same, each under a name of its
own that is then moved into place. A file whose content no longer has its hash is written anew.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType

from ...errors import KernelCacheError

# The environment variable that says where generated files go.
FOLDER_VARIABLE = "LLCOMPILE_KERNEL_DIR"


_log = logging.getLogger("llcompile.kernels")


def folder() -> Path:
    """Where generated files go: ``$LLCOMPILE_KERNEL_DIR``, or ``llcompile/kernels`` in the user's cache folder."""
    chosen = os.environ.get(FOLDER_VARIABLE)
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llcompile" / "kernels"


def file_of(source: str, name: str, place: Path | None = None) -> Path:
    """The file that holds ``source``, in ``place`` (default: :func:`folder`), written if it is not there or damaged.

    Raises :class:`KernelCacheError` where it cannot be written.
    """
    content = source.encode()
    path = (place or folder()) / f"{name}_{hashlib.sha256(content).hexdigest()[:16]}.py"
    found = _read(path)
    if found != content:
        if found is not None:
            _log.warning("%s is damaged: its content has not the hash in its name; it is written anew", path)
        write(path, content)
    return path


def load(path: Path) -> ModuleType:
    """Import a generated file, once per process."""
    name = f"llcompile_generated_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def write(path: Path, content: bytes) -> None:
    """Put ``content`` in place whole, whoever reads or writes at the same time; raises :class:`KernelCacheError`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise KernelCacheError(
            f"generated kernels cannot be written to {path.parent} ({error.strerror or error}); "
            f"set the environment variable {FOLDER_VARIABLE} to a folder that can be written"
        ) from error
