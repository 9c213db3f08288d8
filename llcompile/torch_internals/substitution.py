"""Substitution: a stand-in is traced where user code calls a function."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.variables import AutogradFunctionVariable, UserFunctionVariable

# By the autograd.Function: what is traced for its `apply`, and whether it is in the trace under way.
_applied: dict[type, tuple[types.FunctionType, Callable[[], bool]]] = {}


def substitute(function: Callable[..., Any], replacement: Callable[..., Any]) -> None:
    """Has Dynamo trace `replacement` wherever traced code calls `function`; eager calls are untouched."""
    torch.compiler.substitute_in_graph(function, skip_signature_check=True)(replacement)  # type: ignore[arg-type]


def substitute_applied(
    function: type[torch.autograd.Function], replacement: Callable[..., Any], wanted: Callable[[], bool]
) -> None:
    """Has Dynamo trace `replacement` wherever traced code calls `function.apply`, if `wanted` says so in that trace."""
    assert isinstance(replacement, types.FunctionType)
    _see_applied()
    _applied[function] = replacement, wanted


@functools.cache
def _see_applied() -> None:
    """Dynamo has no table of its own for the `apply` of an autograd.Function."""
    call_method = AutogradFunctionVariable.call_method

    def call(self: Any, tx: Any, name: str, args: Any, kwargs: Any) -> Any:
        replacement, wanted = _applied.get(self.fn_cls, (None, None))
        if name != "apply" or replacement is None or wanted is None or not wanted():
            return call_method(self, tx, name, args, kwargs)
        return UserFunctionVariable(replacement).call_function(tx, args, kwargs)

    AutogradFunctionVariable.call_method = call  # type: ignore[method-assign]


def unsubstituted(function: types.FunctionType) -> types.FunctionType:
    """A copy of `function` that Dynamo does not know to be substituted."""
    copy = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__dict__.update(function.__dict__)
    copy.__module__, copy.__qualname__ = function.__module__, function.__qualname__
    return copy
