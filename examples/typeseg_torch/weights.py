"""typeseg's weights, read from the installed package or from its wheel."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

from llcompile.errors import SpecError

VARIABLE = "TYPESEG_WHEEL"
_LABELS, _WEIGHTS = "typeseg/data/manifest.json", "typeseg/data/mamba_al.npz"


def wheel() -> Path | None:
    """The wheel that $TYPESEG_WHEEL names, or one in the folder .whl."""
    named = os.environ.get(VARIABLE)
    return Path(named) if named else next(iter(sorted(Path(".whl").glob("typeseg-*.whl"))), None)


def available() -> bool:
    """Whether there is an installed package or a wheel."""
    found = wheel()
    return _installed() is not None or (found is not None and found.exists())


def read() -> tuple[list[str], dict[str, Any]]:
    """The names of the labels, and the arrays by their names.

    Raises SpecError where neither the package nor its wheel is found.
    """
    import numpy as np

    manifest, packed = _bytes(_LABELS), _bytes(_WEIGHTS)
    with np.load(io.BytesIO(packed)) as arrays:
        return json.loads(manifest)["labels"], {name: arrays[name] for name in arrays.files}


def _bytes(name: str) -> bytes:
    root, found = _installed(), wheel()
    if root is not None:
        return (root / name).read_bytes()
    if found is None or not found.exists():
        raise SpecError(f"typeseg is not here: pip install typeseg, or name its wheel in ${VARIABLE}")
    with zipfile.ZipFile(found) as archive:
        return archive.read(name)


def _installed() -> Path | None:
    spec = importlib.util.find_spec("typeseg")
    root = Path(spec.origin).parent.parent if spec is not None and spec.origin else None
    return root if root is not None and root.is_dir() else None
