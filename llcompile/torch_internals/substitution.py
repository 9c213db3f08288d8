"""Substitution: a stand-in is traced where user code calls a function."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch


def substitute(function: Callable[..., Any], replacement: Callable[..., Any]) -> None:
    """Has Dynamo trace `replacement` wherever traced code calls `function`; eager calls are untouched."""
    torch.compiler.substitute_in_graph(function, skip_signature_check=True)(replacement)  # type: ignore[arg-type]


def unsubstituted(function: types.FunctionType) -> types.FunctionType:
    """A copy of `function` that Dynamo does not know to be substituted."""
    copy = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__dict__.update(function.__dict__)
    copy.__module__, copy.__qualname__ = function.__module__, function.__qualname__
    return copy
