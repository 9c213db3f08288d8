"""Capture: makes known library functions leaves of the Dynamo graph, without touching their source.

Dynamo is told to trace a stand-in wherever user code calls a known function. Under our backend the stand-in is one
call node whose target is a `Leaf`; under any other backend it is the function itself, so nobody else notices.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch

from llcompile.passes import dynamo
from llcompile.passes.lower import lower_call
from llcompile.patterns.known import ROWS, KnownFunction
from llcompile.patterns.known.arguments import Mismatch

# Modules that re-export or copy a library's functions under another root.
_ALIASES = {"transformers": ("transformers", "transformers_modules")}


class Leaf:
    """A known function as Dynamo's graph sees it; callable, so that shapes can be inferred through it.

    Args:
        row: its row in the table.
        function: the function as the library defines it, unknown to Dynamo's substitution.
        problem: why its signature is not the one that the row was written for, or None.
    """

    def __init__(self, row: KnownFunction, function: types.FunctionType) -> None:
        self.row = row
        self.function = function
        self.plain = plain_form(function)
        self.problem = row.signature_problem(self.plain)
        self.names = positional_names(function)
        self.calls = _call_node_target(self)

    def reference(self) -> Callable[..., Any] | None:
        """The library's own device-independent form of the function, where the row names one that imports."""
        if self.row.reference is None:
            return None
        module, name = self.row.reference.split(":")
        try:
            return getattr(importlib.import_module(module), name, None)
        except ImportError:
            return None

    def __call__(self, **arguments: Any) -> Any:
        """Runs the linear operator in the function's place (under Dynamo: on fake tensors, for the shapes)."""
        if self.problem is not None:
            return self.function(**arguments)
        try:
            return lower_call(self.row, self.plain, arguments, levels=_levels_of_trace())
        except Mismatch:  # the bind pass says why in the report
            return self.function(**arguments)


_leaves: dict[int, Leaf] = {}
_targets: dict[Callable[..., Any], Leaf] = {}
_levels_of_trace: Callable[[], int | None] = lambda: None  # noqa: E731  (set by `install`)


def leaf_of(target: Any) -> Leaf | None:
    """The leaf whose call a node's target is, or None."""
    try:
        return _targets.get(target)
    except TypeError:  # unhashable
        return None


def plain_form(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function below `functools.wraps` wrappers (transformers' kernel dispatch, FLA's compile guard)."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


def positional_names(function: Callable[..., Any]) -> tuple[str, ...]:
    """The names that positional arguments bind to."""
    code = plain_form(function).__code__  # type: ignore[attr-defined]
    return code.co_varnames[: code.co_argcount]


def install(is_ours: Callable[[], bool], levels_of_trace: Callable[[], int | None]) -> int:
    """Registers every known function of the libraries imported so far; returns how many were new.

    Args:
        is_ours: tells, while Dynamo traces, whether our backend will get the graph.
        levels_of_trace: the number of levels that the mixer being traced will have, or None for the linear operator;
            it decides the shape of the final state.
    """
    global _levels_of_trace
    _levels_of_trace = levels_of_trace
    new = [(row, f) for row in ROWS for f in _definitions(row) if id(f) not in _leaves]
    for row, function in new:
        leaf = Leaf(row, dynamo.unsubstituted(function))
        _leaves[id(function)] = leaf
        _targets[leaf.calls] = leaf
        dynamo.substitute(function, _stand_in(leaf, is_ours))
    return len(new)


def _definitions(row: KnownFunction) -> Iterable[types.FunctionType]:
    """Every distinct function object that is this row's function, in the modules imported so far."""
    roots = _ALIASES.get(row.library, (row.library,))
    seen: dict[int, types.FunctionType] = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] not in roots:
            continue
        value = vars(module).get(row.function)
        if isinstance(value, types.FunctionType) and value.__module__.split(".")[0] in roots:
            seen[id(value)] = value
    return seen.values()


def _call_node_target(leaf: Leaf) -> Callable[..., Any]:
    def target(**arguments: Any) -> Any:
        return leaf(**arguments)

    target.__name__ = target.__qualname__ = leaf.row.function
    target.__module__ = "llcompile.passes.capture"
    torch._dynamo.allow_in_graph(target)
    return target


def _stand_in(leaf: Leaf, is_ours: Callable[[], bool]) -> Callable[..., Any]:
    names, target, function = leaf.names, leaf.calls, leaf.function
    kept = frozenset(leaf.row.parameters) | frozenset(inspect.signature(leaf.plain).parameters)
    ours = torch._dynamo.assume_constant_result(is_ours)

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        if not ours():
            return function(*args, **kwargs)
        arguments = dict(zip(names, args, strict=False))
        arguments.update(kwargs)
        return target(**{name: value for name, value in arguments.items() if name in kept})

    return stand_in
