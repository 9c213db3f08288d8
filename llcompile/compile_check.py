"""Checks `options` and prepares capture at the moment torch.compile is called, not at the first run of the model.

torch.compile has no hook for that: it stores a backend's options in `torch._TorchCompileWrapper` unseen. This file is
the only one that touches that class.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch

from llcompile.options import Options


def install(backend: Callable[..., Any], prepare: Callable[[], None]) -> None:
    """Has every later `torch.compile(backend=...)` of ours checked, and the one that is importing us right now."""
    wrapper = torch._TorchCompileWrapper
    original = wrapper.__init__

    @functools.wraps(original)
    def checked(self: Any, backend_: Any, mode: Any, options: Any, dynamic: Any) -> None:
        original(self, backend_, mode, options, dynamic)
        if self.compiler_fn is backend:
            Options.parse(options)
            prepare()

    wrapper.__init__ = checked  # type: ignore[method-assign]
    _check_caller(original.__code__)
    prepare()


def _check_caller(code: Any) -> None:
    """`backend="loglinear"` imports us from within the wrapper's __init__: look at the options it was given."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is code:
            Options.parse(frame.f_locals.get("options"))
            return
        frame = frame.f_back  # type: ignore[assignment]
