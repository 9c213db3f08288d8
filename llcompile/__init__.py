"""llcompile: a torch.compile backend that turns linear-time mixers into log-linear attention."""

from __future__ import annotations

import importlib
from typing import Any

from llcompile.integrations.after_import import after_import

__version__ = "0.1.0"

# Public names, each with the module that defines it. They load on first use, so that `import llcompile.errors`
# (which every folder does) neither costs an import of torch nor closes a circle of imports.
_PUBLIC = {
    "convert": "llcompile.conversion",
    "inspect": "llcompile.conversion",
    "revert": "llcompile.conversion",
    "save": "llcompile.weights.checkpoint",
    "load": "llcompile.weights.checkpoint",
    "decompositions": "llcompile.decomposition",
    "LevelWeights": "llcompile.weights.level_weights",
    "Look": "llcompile.look.look",
    "Report": "llcompile.report",
    "Options": "llcompile.options",
}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'llcompile' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


# Torch does it, too, where llcompile is installed and TORCH_DEVICE_BACKEND_AUTOLOAD is not 0.
after_import("torch", lambda _: importlib.import_module("llcompile.autoload").register())
