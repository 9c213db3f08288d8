"""Runs the text of a program."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from pathlib import Path
from typing import Any


def run(path: Path) -> Any:
    """Imports the program from its file (so that its lines can be named) and checks it; returns its report.

    Raises:
        AssertionError: see `check`. What else is raised came from the program or from llcompile.
    """
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # Dynamo looks a frame's globals up by the name of their module
    try:
        spec.loader.exec_module(module)
        with warnings.catch_warnings():
            return module.main(module.make, module.runner, module.LENGTHS, module.D)
    finally:
        del sys.modules[path.stem]
