"""autograd.Functions as known functions: user code calls their `apply`, whose arguments are those of `forward`."""

from __future__ import annotations

import inspect
import types
from typing import Any

import torch
from torch.autograd.function import _is_setup_context_defined


def is_applied(value: Any) -> bool:
    """Whether this is an autograd.Function's class."""
    return isinstance(value, type) and issubclass(value, torch.autograd.Function)


def as_function(applied: type[torch.autograd.Function]) -> types.FunctionType:
    """A plain function that calls `apply`, with the signature of `forward` but for its context."""
    given = list(inspect.signature(applied.forward).parameters.values())
    takes_context = not _is_setup_context_defined(applied.setup_context)
    signature = inspect.Signature(given[1:] if takes_context else given)

    def function(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return applied.apply(*bound.args)  # type: ignore[no-untyped-call]

    function.__name__ = function.__qualname__ = applied.__name__
    function.__module__ = applied.__module__
    function.__signature__ = signature  # type: ignore[attr-defined]
    assert isinstance(function, types.FunctionType)
    return function
