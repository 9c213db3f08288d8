"""Which backend a trace is for: the wrappers around it, and what is noted about it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from llcompile.torch_internals.frame import current_output

# What Dynamo calls some breaks among friends.
_EVAL_FRAME = torch._dynamo.eval_frame.__file__


def tracing_backend() -> tuple[Any, dict[str, Any]]:
    """The backend of the trace under way, without the wrappers around it, and the keyword arguments for it."""
    output = current_output()
    return (None, {}) if output is None else unwrapped(output.compiler_fn)


def unwrapped(function: Any) -> tuple[Any, dict[str, Any]]:
    """A backend without what wraps it (torch.compile, DDP's optimizer, a partial), and its keyword arguments."""
    keywords: dict[str, Any] = {}
    for _ in range(12):  # wrappers are nested a few deep
        given = getattr(function, "keywords" if isinstance(function, functools.partial) else "kwargs", None)
        keywords = {**keywords, **given} if isinstance(given, dict) else keywords
        inner = next((f for read in _INNER if (f := read(function)) is not None), None)
        if inner is None:
            break
        function = inner
    return function, keywords


# How each kind of wrapper holds the backend that it calls.
_INNER: tuple[Callable[[Any], Any], ...] = (
    lambda wrapper: getattr(wrapper, "_torchdynamo_orig_backend", None),
    lambda wrapper: getattr(wrapper, "compiler_fn", None),
    lambda wrapper: getattr(getattr(wrapper, "__self__", None), "backend_compile_fn", None),
    lambda wrapper: wrapper.func if isinstance(wrapper, functools.partial) else None,
)


def mark_backend(name: str, value: Any) -> None:
    """Notes something about the backend of the trace under way, for its later traces."""
    output = current_output()
    if output is not None:
        setattr(_outermost(output), name, value)


def backend_mark(name: str) -> Any:
    """What `mark_backend` noted about the backend of the trace under way, or None."""
    output = current_output()
    return None if output is None else getattr(_outermost(output), name, None)


def _outermost(output: Any) -> Any:
    """The object that stands for one torch.compile: it lives as long as the compiled function."""
    function = output.compiler_fn
    function = getattr(function, "_llcompile_watched", function)
    inner = getattr(function, "_torchdynamo_orig_backend", None)
    held = function if inner is None else inner
    return getattr(held, "__self__", held)  # a bound method takes no attributes


def around_backend(around: Callable[[Callable[..., Any], fx.GraphModule, list[Any]], Any]) -> None:
    """Has `around(backend, graph, inputs)` called in the place of the backend of the trace under way."""
    output = current_output()
    if output is None or output.compiler_fn is None or hasattr(output.compiler_fn, "_llcompile_watched"):
        return
    given = output.compiler_fn

    def watched(module: fx.GraphModule, inputs: list[Any], **configs: Any) -> Any:
        return around(functools.partial(given, **configs), module, inputs)

    watched.__name__ = getattr(given, "__name__", type(given).__name__)
    watched._torchdynamo_orig_backend = given  # type: ignore[attr-defined]
    watched._llcompile_watched = given  # type: ignore[attr-defined]
    output.compiler_fn = watched


def backend_below() -> tuple[Any, dict[str, Any]]:
    """The backend of the innermost compiled call that is under way in Python, and its keyword arguments."""
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "compile_wrapper" and frame.f_code.co_filename == _EVAL_FRAME:
            return unwrapped(getattr(frame.f_locals.get("self"), "callback", None))
        frame = frame.f_back
    return None, {}
