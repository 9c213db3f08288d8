"""Log-linear attention over many processes: sequences that are spread over them, and heads (tensor parallel)."""

from __future__ import annotations

import importlib
from typing import Any

# They load on first use: the backend is loaded in each process, torch.distributed's parts need not be.
_PUBLIC = {
    "context_parallel": "llcompile.distributed.context",
    "LevelWeightsParallel": "llcompile.distributed.tensor_parallel",
    "loglinear_attention": "llcompile.distributed.context",
    "Traffic": "llcompile.distributed.messages",
}

__all__ = ["LevelWeightsParallel", "Traffic", "context_parallel", "loglinear_attention"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'llcompile.distributed' has no attribute {name!r}")
