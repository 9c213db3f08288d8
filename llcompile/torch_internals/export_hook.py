"""What makes torch.export see a converted model rewritten: `exporting` does it, here is where it is called.

torch.export has no hook for that. This file is the only one that touches its entry, `torch.export._trace._export`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def install(has_levels: Callable[[nn.Module], bool], rewritten_call: Callable[..., Any]) -> None:
    """Has every later torch.export (strict=False, its default) of a module with level weights record it rewritten.

    `rewritten_call(module, args, kwargs)` runs a module by its rewritten graph.
    """
    from torch.export import _trace

    original = _trace._export

    @functools.wraps(original)
    def export(mod: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("strict", True) or not isinstance(mod, nn.Module) or not has_levels(mod):
            return original(mod, *args, **kwargs)
        with _rewritten(mod, rewritten_call):
            return original(mod, *args, **kwargs)

    _trace._export = export


@contextmanager
def _rewritten(module: nn.Module, rewritten_call: Callable[..., Any]) -> Iterator[None]:
    """For as long as it is exported, a call of the module is one of its rewritten graph."""
    compiled = module._compiled_call_impl

    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return module._call_impl(*args, **kwargs)
        return rewritten_call(module, args, kwargs)

    module._compiled_call_impl = call
    try:
        yield
    finally:
        module._compiled_call_impl = compiled
