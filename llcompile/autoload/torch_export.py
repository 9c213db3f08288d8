"""torch.export: a converted model is recorded by its rewritten graph (`exporting`); others are recorded as they are."""

from __future__ import annotations

import functools
import sys
from types import ModuleType
from typing import Any

MODULE = "torch.export._trace"


@functools.cache
def install(module: ModuleType) -> None:
    """Has every later export look whether the model has level weights, once."""
    from llcompile.torch_internals import export_hook

    export_hook.install(_has_levels, _rewritten_call)


def _has_levels(model: Any) -> bool:
    if "llcompile.weights.attachment" not in sys.modules:  # then nothing has level weights
        return False
    from llcompile.weights.attachment import attached

    return next(attached(model), None) is not None


def _rewritten_call(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # A process that only unpickles a converted model and exports it has not imported this yet.
    from llcompile.exporting import rewritten_call

    return rewritten_call(module, args, kwargs)
