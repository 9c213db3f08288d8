"""torch.distributed.tensor: the operators run on DTensors, by the rules of `distributed.sharding`."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

MODULE = "torch.distributed.tensor"
OPERATORS = (
    "loglinear_attention",
    "loglinear_attention_backward",
    "loglinear_attention_step",
    "level_readouts",
    "level_readouts_backward",
    "level_readouts_step",
)


def install(module: ModuleType) -> None:
    """Registers the rules, which are loaded by the first call of an operator."""
    for name in OPERATORS:
        torch.library.register_torch_dispatch(f"llcompile::{name}", module.DTensor, _run)


def _run(_: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    from llcompile.distributed.sharding import run

    return run(func, args, kwargs or {})
