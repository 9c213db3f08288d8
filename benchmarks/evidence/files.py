"""Source files on this machine: texts by their type, split into training and held-out files by their paths."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# typeseg's labels, and the files that are of this type from the first character to the last.
TYPES = {
    "python": (".py",),
    "c_family": (".h", ".c", ".cpp", ".hpp", ".cuh", ".cu"),
    "javascript_typescript": (".js", ".ts", ".mjs"),
    "css": (".css",),
    "json": (".json",),
    "yaml": (".yaml", ".yml"),
    "shell": (".sh", ".bash"),
    "restructuredtext": (".rst",),
    "markdown": (".md",),
    "csv": (".csv",),
    "svg": (".svg",),
    "xml": (".xml",),
    "sql": (".sql",),
    "gettext_catalog": (".po",),
}
_HELD_OUT = 5  # one file of so many
_LEAST, _MOST = 400, 400_000  # bytes of a file
_WIDEST = 400  # bytes a line; longer ones are data


class Files:
    """The texts of up to `limit` files of each type.

    Args:
        types: labels of TYPES.
        held_out: whether to take the files that no training sees.
        limit: files of a type, the same ones for the same paths.
    """

    def __init__(self, types: tuple[str, ...], held_out: bool, limit: int) -> None:
        endings = {ending: label for label in types for ending in TYPES[label]}
        found: dict[str, list[tuple[int, Path]]] = {label: [] for label in types}
        for path in _walk(tuple(endings)):
            order = _hash(path)
            if (order % _HELD_OUT == 0) == held_out:
                found[endings[path.suffix]].append((order, path))
        self.texts = {label: _texts(sorted(paths), limit) for label, paths in found.items()}
        self.texts = {label: texts for label, texts in self.texts.items() if texts}


def roots() -> list[Path]:
    """Where files are looked for: this Python's packages and its library, and what the system has to share."""
    paths = sysconfig.get_paths()
    places = [paths[name] for name in ("purelib", "platlib", "stdlib")] + [
        "/usr/share",
        "/usr/include",
        "/usr/lib/python3",
    ]
    return [Path(place) for place in dict.fromkeys(places) if Path(place).is_dir()]


def _walk(endings: tuple[str, ...]) -> Iterator[Path]:
    for root in roots():
        for folder, folders, names in os.walk(root):
            folders[:] = [name for name in folders if name != "__pycache__"]
            yield from (Path(folder, name) for name in names if name.endswith(endings))


def _hash(path: Path) -> int:
    """The same for one package in different places."""
    return int.from_bytes(hashlib.sha256("/".join(path.parts[-4:]).encode()).digest()[:6], "big")


def _texts(paths: list[tuple[int, Path]], limit: int) -> list[bytes]:
    texts: list[bytes] = []
    for _, path in paths:
        try:
            if not _LEAST <= path.stat().st_size <= _MOST:
                continue
            text = path.read_bytes()
        except OSError:
            continue
        if max(map(len, text.split(b"\n"))) <= _WIDEST:
            texts.append(text)
        if len(texts) == limit:
            break
    return texts
