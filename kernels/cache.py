"""Generated files on disk: written once, checked when read, safe while other processes write the same ones.

A file's name holds the hash of its content, so two processes that write one write the same, each under a name of its
own that is then moved into place. A file whose content no longer has its hash is written anew.

What runs is the text whose hash was checked, from memory: nobody can change it in between, and no bytecode is read or
written. A folder that other people can write to is refused all the same, and a file of somebody else is not used.
"""

from __future__ import annotations

import contextlib
import hashlib
import linecache
import logging
import os
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from llcompile.errors import KernelCacheError
from llcompile.torch_internals.logs import artifact, kernel_log

# The environment variable that says where generated files go.
FOLDER_VARIABLE = "LLCOMPILE_KERNEL_DIR"

# Temporary files: how their names end, and after how many seconds nobody is writing them any more.
_TEMPORARY = ".tmp"
_LEFT_OVER = 3600.0


class File(NamedTuple):
    """A generated file in the folder."""

    path: Path
    text: str  # the line of its header that says what it was made for


_loading = threading.RLock()
_log = logging.getLogger("llcompile.kernels")


def folder() -> Path:
    """Where generated files go: `$LLCOMPILE_KERNEL_DIR`, or `llcompile/kernels` in the user's cache folder."""
    chosen = os.environ.get(FOLDER_VARIABLE)
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llcompile" / "kernels"


def file_of(source: str, name: str, place: Path | None = None, suffix: str = ".py") -> Path:
    """The file that holds `source`, in `place` (default: `folder`), written if it is not there or damaged.

    Raises `KernelCacheError` where it cannot be written, and for a default folder that is not this user's alone.
    """
    content = source.encode()
    path = (place or folder()) / f"{name}_{content_hash(content)}{suffix}"
    if place is None and path.parent.is_dir():
        check_folder(path.parent)
    found = _read(path)
    if found != content:
        if found is not None:
            _tell_damage(path)
        write(path, content)
    return path


def load(path: Path) -> ModuleType:
    """Run a generated file, once per process.

    Raises `KernelCacheError` where it cannot be read, or has not the hash in its name.
    """
    name = f"llcompile_generated_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    with _loading:
        if name not in sys.modules:
            sys.modules[name] = _run(name, path)  # only now: another thread must not find it half made
        return sys.modules[name]


def _run(name: str, path: Path) -> ModuleType:
    content = _read(path)
    if content is None or not _has_its_hash(path, content):
        wrong = "cannot be read" if content is None else "is damaged"
        raise KernelCacheError(
            f"{path} {wrong}: generated kernels run only if their content has the hash in the file's name. Remove the "
            "file; it will be written again"
        )
    text = content.decode()
    _show(path, text)
    module = ModuleType(name)
    module.__file__ = str(path)
    # Triton asks for the source of its functions by their file: it gets the text that was checked. No time of change
    # (None) means that it stays.
    linecache.cache[str(path)] = (len(text), None, text.splitlines(keepends=True), str(path))
    exec(compile(text, str(path), "exec", dont_inherit=True), module.__dict__)
    return module


def files(suffix: str, begin: str) -> list[File]:
    """The files in the folder with a line in their header that begins so, by name; others are passed over."""
    found = []
    for path in sorted(folder().glob(f"*{suffix}")):
        head = path.read_text(errors="replace").splitlines()[:5]
        line = next((x for x in head if x.startswith(begin)), None)
        if line is not None:
            found.append(File(path, line))
    return found


def is_whole(path: Path) -> bool:
    """Whether a file of ours has the hash in its name; one that is damaged is told of."""
    content = _read(path)
    if content is not None and not _has_its_hash(path, content):
        _tell_damage(path)
        return False
    return content is not None


def content_hash(content: bytes) -> str:
    """The end of a file's name, before the dot."""
    return hashlib.sha256(content).hexdigest()[:16]


def _has_its_hash(path: Path, content: bytes) -> bool:
    return path.stem.endswith(f"_{content_hash(content)}")


def _tell_damage(path: Path) -> None:
    _log.warning("%s is damaged: its content does not have the hash in its name; it is written again", path)


def _show(path: Path, text: str) -> None:
    shown = kernel_log()
    if shown.isEnabledFor(logging.DEBUG):
        shown.debug("%s\n%s", path, text)
    artifact(f"loglinear_kernels_{path.stem}", lambda: text)


def _read(path: Path) -> bytes | None:
    """The content of a file of ours; None where there is none, or it is somebody else's."""
    try:
        with path.open("rb") as file:
            return file.read() if _ours(os.fstat(file.fileno())) else None
    except OSError:
        return None


def write(path: Path, content: bytes) -> None:
    """Put `content` in place whole, whoever reads or writes at the same time; raises `KernelCacheError`."""
    with writing_to(path.parent):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=_TEMPORARY)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        _remove_left_over(path.parent)


@contextlib.contextmanager
def writing_to(place: Path) -> Iterator[None]:
    """Raise `KernelCacheError` in place of what the system says where `place` cannot be written."""
    try:
        yield
    except OSError as error:
        raise KernelCacheError(
            f"generated kernels cannot be written to {place} ({error.strerror or error}); "
            f"set the environment variable {FOLDER_VARIABLE} to a folder that can be written"
        ) from error


@contextlib.contextmanager
def turn(path: Path) -> Iterator[None]:
    """Only one process at a time; all at once where there are no locks, which wastes time and nothing else."""
    with writing_to(path.parent):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = path.open("w")
    with file:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX)  # this process's alone: a child that is forked meanwhile waits for it
        yield


def check_folder(place: Path) -> None:
    """Raise `KernelCacheError` for a folder in which another user can put files in place of ours."""
    found = place.stat()
    if _ours(found) or (found.st_uid in (0, _user()) and found.st_mode & stat.S_ISVTX):
        return
    wrong = "belongs to another user" if found.st_uid not in (0, _user()) else "can be written by other users"
    raise KernelCacheError(
        f"the folder for generated kernels, {place}, {wrong}, and what is in it runs as you; set the environment "
        f"variable {FOLDER_VARIABLE} to a folder of your own, or remove write permission for others (chmod go-w)"
    )


def _ours(found: os.stat_result) -> bool:
    """Whether only this user (or root) can change what was found; a group of one's own counts as oneself."""
    if os.name != "posix":
        return True
    others = stat.S_IWOTH | (0 if found.st_gid in (0, os.getegid()) else stat.S_IWGRP)
    return found.st_uid in (0, _user()) and not found.st_mode & others


def _user() -> int:
    return os.geteuid() if os.name == "posix" else 0


def _remove_left_over(place: Path) -> None:
    """Temporary files of processes that were killed while they wrote."""
    for left in place.glob(f".*{_TEMPORARY}"):
        try:
            if time.time() - left.stat().st_mtime > _LEFT_OVER:
                left.unlink()
        except OSError:  # another process was faster, or it is not ours
            continue
