"""A digest of llcompile's own sources, so that compile caches never serve a graph of an older version of them."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path


@functools.cache
def source_tag() -> str:
    """Hex digest of every source file of the package."""
    return digest(Path(__file__).resolve().parent.parent)


def digest(folder: Path) -> str:
    """Hex digest of all Python and all templates of kernels below `folder`, names included; links are followed."""
    sha = hashlib.sha256()
    for base in (folder, *sorted(p for p in folder.iterdir() if p.is_dir())):
        found = base.glob("*") if base == folder else base.rglob("*")
        for path in sorted(p for p in found if p.suffix in (".py", ".jinja")):
            sha.update(str(path.relative_to(folder)).encode())
            sha.update(path.read_bytes())
    return sha.hexdigest()[:16]
