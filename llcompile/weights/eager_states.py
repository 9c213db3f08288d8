"""Explains the error of a mixer that ran eagerly, outside of our graphs, on a state with levels.

The library's code knows no such state and fails with a message about shapes.
"""

from __future__ import annotations

import sys
import warnings
from types import TracebackType

import torch

from llcompile.errors import EagerStateWarning


def explain(owner: str, levels: set[int]) -> None:
    """Warns if the error being handled comes from code that held a state with levels.

    Args:
        owner: the class of the module that failed.
        levels: the numbers of levels that its level weights have.
    """
    error = sys.exc_info()[1]
    found = None if error is None else _level_state(error.__traceback__, levels)
    if found is None:
        return
    function, shape = found
    warnings.warn(
        f"{owner} was run eagerly and failed (see the error below): {function}, the library's own code, received a "
        f"state with levels of shape {list(shape)}, which only compiled code can read. Run every call on this cache "
        "through torch.compile(model, backend='loglinear'). If they all are, Dynamo has stopped compiling, with a "
        "warning: raise the limit that it names, torch._dynamo.config.recompile_limit or accumulated_recompile_limit.",
        EagerStateWarning,
        stacklevel=4,
    )


def _level_state(traceback: TracebackType | None, levels: set[int]) -> tuple[str, torch.Size] | None:
    """The innermost function that failed with a state [B, H, 1 + L, K, V] among its variables, and its shape."""
    found = None
    while traceback is not None:
        for value in traceback.tb_frame.f_locals.values():
            if isinstance(value, torch.Tensor) and value.dim() == 5 and value.shape[2] - 1 in levels:
                found = traceback.tb_frame.f_code.co_name, value.shape
        traceback = traceback.tb_next
    return found
