"""A digest of llcompile's own sources, so that compile caches never serve a graph of an older version of them."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path


@functools.cache
def source_tag() -> str:
    """Hex digest of every Python file of the package."""
    return digest(Path(__file__).resolve().parent.parent)


def digest(folder: Path) -> str:
    """Hex digest of every Python file below `folder`, names included; symbolic links to folders are followed."""
    sha = hashlib.sha256()
    for base in (folder, *sorted(p for p in folder.iterdir() if p.is_dir())):
        for path in sorted(base.glob("*.py") if base == folder else base.rglob("*.py")):
            sha.update(str(path.relative_to(folder)).encode())
            sha.update(path.read_bytes())
    return sha.hexdigest()[:16]
