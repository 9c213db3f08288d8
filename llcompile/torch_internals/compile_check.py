"""Checks options and the model, and prepares capture, when torch.compile is called, not at the model's first run.

torch.compile has no hook for that: it stores a backend's options in `torch._TorchCompileWrapper` unseen, and applies
the backend to the model afterwards. This file is the only one that touches that class.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Callable
from typing import Any

import torch


def install(
    backend: Callable[..., Any],
    parse: Callable[[Any], object],
    prepare: Callable[[], None],
    check_model: Callable[[Any], None],
) -> None:
    """Has every later `torch.compile(backend=...)` of ours checked, and the one that is importing us right now.

    `parse` raises where options are no good, `check_model` where what is compiled cannot be traced; `prepare` is called
    before anything is traced.
    """
    wrapper = torch._TorchCompileWrapper
    original = wrapper.__init__

    @functools.wraps(original)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        # Whatever this release of torch takes: a later one hands more over, also for other backends.
        original(self, *args, **kwargs)
        if getattr(self, "compiler_fn", None) is backend:
            parse(_options(original, (self, *args), kwargs))
            check_model(_model(sys._getframe(1)))
            prepare()

    wrapper.__init__ = checked  # type: ignore[method-assign]
    _check_caller(wrapper, parse, check_model)
    prepare()


def _options(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return inspect.signature(function).bind(*args, **kwargs).arguments.get("options")


def _model(frame: types.FrameType | None) -> Any:
    """What the innermost call of torch.compile that a frame is part of compiles; None outside of any."""
    while frame is not None and frame.f_code is not torch.compile.__code__:
        frame = frame.f_back
    return None if frame is None else frame.f_locals.get("model")


def _check_caller(wrapper: type, parse: Callable[[Any], object], check_model: Callable[[Any], None]) -> None:
    """`backend="loglinear"` imports us from within the wrapper's __init__: look at what it was given."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__init__" and isinstance(frame.f_locals.get("self"), wrapper):
            parse(frame.f_locals.get("options"))
            check_model(_model(frame.f_back))
            return
        frame = frame.f_back
