"""What the user is told where an example run fails: our own error, or whether the model or its analysis is at fault."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
from torch import nn

from llcompile.checks.example import Example
from llcompile.errors import CaptureError, ExampleError, LLCompileError
from llcompile.report import GraphBreak, Report, Untouched
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
    broken = _device_error(error) or _device_error(without)
    if broken is not None:
        return CaptureError(
            f"a device failed while {name} ran on the example inputs ({given}): {_first_line(broken)}. Whether the "
            "model runs cannot be told, because no call on that device succeeds in this process any more; the model's "
            "tensors there may be lost. Start a new process, with CUDA_LAUNCH_BLOCKING=1 to find the call, and run "
            "model(*inputs) alone first."
        )
    if without is not None:
        return ExampleError(
            f"{name} does not run on the example inputs ({given}): {type(without).__name__}: {without}. Pass inputs "
            "that model(*inputs) takes; nothing was changed."
        )
    cause = getattr(error, "inner_exception", None) or error
    return CaptureError(
        f"{name} runs on the example inputs ({given}), but its analysis failed: {type(cause).__name__}: {cause}. "
        "This is a bug in llcompile or in Dynamo, not in the inputs; nothing was changed. Please report it with the "
        "traceback above; torch.compile(model, backend='eager') shows whether Dynamo can trace the model."
    )


def _device_error(error: BaseException | None) -> BaseException | None:
    """The error of a device (an illegal access, a failed assertion) that led to this one, if one did."""
    while error is not None and not isinstance(error, torch.AcceleratorError):
        error = getattr(error, "inner_exception", None) or error.__cause__ or error.__context__
    return error


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]


def own_error(error: BaseException | None) -> LLCompileError | None:
    """Our own error inside Dynamo's wrapping, if that is what it is."""
    while error is not None:
        if isinstance(error, LLCompileError):
            return error
        error = getattr(error, "inner_exception", None) or error.__cause__
    return None


def without_graph(example: Example) -> Report:
    """What there is to say of a model that runs and became no graph; empty where it computes nothing."""
    with example.transaction():
        refused = why_no_graph(example.model.forward, example.args, dict(example.kwargs))
    if refused is None:
        return Report()
    reason, where = refused
    code = inspect.unwrap(type(example.model).forward).__code__
    where = where or f"{code.co_filename}:{code.co_firstlineno} in {code.co_name}"
    remark = (
        f"Dynamo makes no graph of {type(example.model).__name__}, so nothing in it was analysed; it runs uncompiled. "
        "Set TORCH_LOGS=graph_breaks for details."
    )
    return Report(breaks=(GraphBreak(reason, where),), remarks=(remark,))


def recurrent(example: Example) -> Report:
    """torch's own recurrent networks, which Dynamo does not trace: no graph shows them."""
    if torch._dynamo.config.allow_rnn:
        return Report()
    found = [(name, m.mode) for name, m in example.model.named_modules() if isinstance(m, nn.RNNBase)]
    return Report(untouched=tuple(Untouched(name, f"recurrent network ({mode})") for name, mode in found))


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
