"""Writing files for a person: whole or not at all, with one clear error."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from llcompile.errors import OutputError


def write_text(path: str | Path, text: str) -> Path:
    """Writes `text` to `path`, replacing what was there; a failure leaves what was there.

    Raises:
        OutputError: the folder does not exist or cannot be written, or `path` is a folder.
    """
    target = Path(path)
    check_target(target)
    name = ""
    try:
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=target.parent, suffix=".part", delete=False) as f:
            name = f.name
            f.write(text)
        mode = target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask()
        os.chmod(name, mode)  # a temporary file is its owner's alone
        os.replace(name, target)
    except OSError as error:
        if name:
            with contextlib.suppress(OSError):
                os.unlink(name)
        raise _refused(target, error.strerror or str(error)) from error
    return target


def check_target(path: str | Path) -> None:
    """Raises OutputError where `write_text` could not write: to be asked before work that takes long."""
    target = Path(path)
    folder = target.parent
    if target.is_dir():
        raise _refused(target, "it is a folder")
    if not folder.is_dir():
        raise _refused(target, f"the folder {folder} does not exist")
    if not os.access(folder, os.W_OK):
        raise _refused(target, f"the folder {folder} is not writable")


def check_folder(path: str | Path) -> None:
    """Raises OutputError where `make_folder` could not make the folder, or nothing could be written to it."""
    folder = Path(path)
    nearest = next((p for p in (folder, *folder.absolute().parents) if p.exists()), folder)
    if not nearest.is_dir():
        raise _refused(folder, f"{nearest} is not a folder")
    if not os.access(nearest, os.W_OK):
        raise _refused(folder, f"the folder {nearest} is not writable")


def make_folder(path: str | Path) -> Path:
    """The folder, made where it does not exist yet.

    Raises:
        OutputError: it cannot be made, or is a file.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot create the folder {folder}: {error.strerror or error}.") from error
    return folder


def _refused(target: Path, reason: str) -> OutputError:
    return OutputError(f"cannot write {target}: {reason}. Nothing was written.")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
