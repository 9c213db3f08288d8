"""What the user is told where an example run fails: our own error, or whether the model or its analysis is at fault."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch

from llcompile.checks.example import Example
from llcompile.errors import CaptureError, LLCompileError
from llcompile.torch_internals.breaks import why_no_graph


def as_ours(example: Example, error: BaseException) -> BaseException:
    """The error that the user meets: our own from inside of Dynamo's wrapping, or what the run came to."""
    own = own_error(error)
    if own is not None:
        own.__suppress_context__ = True
        return own
    if not isinstance(error, Exception):
        return error
    shown = (*map(_shown, example.args), *(f"{k}={_shown(v)}" for k, v in example.kwargs.items()))
    name, given = type(example.model).__name__, ", ".join(shown) or "none given"
    without = _run_without_us(example)
    if without is not None:
        return CaptureError(
            f"{name} does not run on the example inputs ({given}): {type(without).__name__}: {without}. Pass inputs "
            "that model(*inputs) takes; nothing was changed."
        )
    cause = getattr(error, "inner_exception", None) or error
    return CaptureError(
        f"{name} runs on the example inputs ({given}), but its analysis failed: {type(cause).__name__}: {cause}. "
        "This is a bug in llcompile or in Dynamo, not in the inputs; nothing was changed. Please report it with the "
        "traceback above; torch.compile(model, backend='eager') shows whether Dynamo can trace the model."
    )


def own_error(error: BaseException | None) -> LLCompileError | None:
    """Our own error inside Dynamo's wrapping, if that is what it is."""
    while error is not None:
        if isinstance(error, LLCompileError):
            return error
        error = getattr(error, "inner_exception", None) or error.__cause__
    return None


def expect_graph(example: Example) -> None:
    """Raises CaptureError where the model computes something, and became no graph."""
    with example.transaction():
        refused = why_no_graph(example.model.forward, example.args, dict(example.kwargs))
    if refused is not None:
        reason, where = refused
        code = inspect.unwrap(type(example.model).forward).__code__
        where = where or f"{code.co_filename}:{code.co_firstlineno} in {code.co_name}"
        raise CaptureError(
            f"Dynamo could not trace {type(example.model).__name__}, so it was not analysed: {reason} ({where}). "
            "Set TORCH_LOGS=graph_breaks for details; nothing was changed."
        )


def _run_without_us(example: Example) -> Exception | None:
    """What the model raises on the example inputs without us, or None."""
    try:
        with example.transaction(), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            example.run()
    except Exception as error:
        return error
    return None


def _shown(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)[:60]
