"""Capture: makes each call of a known library function one node of the Dynamo graph, without touching their source.

Dynamo is told to trace a stand-in wherever user code calls a known function. Under our backend the stand-in is one
call node whose target is a `CapturedFunction`; under any other backend it is the function itself.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llcompile.patterns import reasons
from llcompile.patterns.known import KnownFunction, entries
from llcompile.patterns.known.applied import as_function, is_applied
from llcompile.patterns.known.arguments import CallRejection, axis_size, sizes_of
from llcompile.patterns.known.entry import Reference
from llcompile.patterns.known.expansions import EXPANSIONS, Expansion
from llcompile.patterns.known.lower import lower_call
from llcompile.patterns.known.state_check import rows_of, state_problem
from llcompile.patterns.reasons import GivenReason
from llcompile.torch_internals import reach
from llcompile.torch_internals.substitution import substitute, substitute_applied, unsubstituted
from llcompile.torch_internals.trace import trace_position

# Modules that re-export or copy a library's functions under another root.
_ALIASES = {"transformers": ("transformers", "transformers_modules")}


class CapturedFunction:
    """A known function as Dynamo's graph sees it.

    Args:
        entry: its entry in the table.
        function: the function as the library defines it, unknown to Dynamo's substitution.
        problem: why its signature is not the one that the entry was written for, or None.
    """

    def __init__(self, entry: KnownFunction, function: types.FunctionType) -> None:
        self.entry = entry
        self.function = function
        self.plain = plain_form(function)
        problem = entry.signature_problem(self.plain)
        named = {"function": entry.function, "library": entry.library}
        self.problem = None if problem is None else reasons.SIGNATURE(**named, problem=problem)
        self.names = positional_names(function)
        # What a call node has as its target, by how many arguments the user gave without their names.
        self.calls = tuple(_call_node_target(self, positions) for positions in range(len(self.names) + 1))

    def references(self) -> Iterator[tuple[str, Callable[..., Any]]]:
        """The library's own device-independent forms of the function that can be imported, each with its name."""
        for reference in self.entry.references:
            module, name = reference.name.split(":")
            try:
                found = getattr(importlib.import_module(module), name)
            except (ImportError, AttributeError):
                continue
            over = "" if reference.callee is None else f"{self.entry.function} over "
            yield over + reference.name, _as_function(reference, found, self.plain)

    def run(self, arguments: Mapping[str, Any], positions: int) -> Any:
        """Calls the function as the user does: the first arguments without their names.

        Transformers' functions hand their arguments on to FLA's or mamba_ssm's where these are installed, which have
        other names for the first ones.
        """
        first = self.names[:positions]
        rest = {name: value for name, value in arguments.items() if name not in first}
        return self.function(*(arguments[name] for name in first), **rest)

    def lowered(self, arguments: dict[str, Any], positions: int) -> Any:
        """Runs the linear operator in the function's place (under Dynamo: on fake tensors, for the shapes)."""
        given = self.problem or _given_up.get(call_key(self, arguments))
        levels = _levels_of_trace()
        arguments = self._with_own_state(arguments, levels, lowered=given is None)
        try:
            if given is None:
                return lower_call(self.entry, self.plain, arguments, levels=levels)
        except CallRejection as rejection:  # the bind pass says so in the report
            given = rejection.given
        if not self.entry.opaque:
            return self.run(self._with_own_state(arguments, levels, lowered=False), positions)
        _trace.refused.append(Refused(self.entry, given, trace_position()))
        # Dynamo breaks the graph here: the function runs outside of it, as it does without us.
        raise NotImplementedError(f"{self.entry.function}: {given.text}")

    def _with_own_state(self, arguments: dict[str, Any], levels: int | None, lowered: bool) -> dict[str, Any]:
        """The call with an empty state in the place of one that it cannot take: the pass `states` raises an error."""
        if state_problem(self.entry, arguments, levels, weighted=lowered and levels is not None) is None:
            return arguments
        sizes, (_, *axes) = sizes_of(self.entry, arguments), self.entry.state_axes(arguments)
        shape = rows_of(self.entry, arguments), *(axis_size(axis, sizes) for axis in axes)
        return {**arguments, self.entry.state: arguments[self.entry.state].new_zeros(shape)}


@dataclass(frozen=True)
class Refused:
    """A call of an opaque function that was declined while it was traced; `meta` is what its node would have had."""

    entry: KnownFunction
    given: GivenReason
    meta: dict[str, Any]


class _Trace(threading.local):
    """What the trace in this thread has come across, until its report takes it."""

    def __init__(self) -> None:
        self.refused: list[Refused] = []


_trace = _Trace()
# Calls of opaque functions that were declined after a trace, and why: the next trace breaks the graph there.
_given_up: dict[Any, GivenReason] = {}
_captured: dict[int, CapturedFunction] = {}
_expanded: dict[int, types.FunctionType] = {}
_targets: dict[Callable[..., Any], CapturedFunction] = {}
# Set by `install`.
_is_ours: Callable[[], bool] = lambda: False  # noqa: E731
_levels_of_trace: Callable[[], int | None] = lambda: None  # noqa: E731
_modules_seen = 0


def call_key(captured: CapturedFunction, arguments: Mapping[str, Any], module: nn.Module | None = None) -> Any:
    """What tells calls apart whose fate may differ: the module, which operands are given and their rank, constants."""
    module = module or reach.innermost_module()
    facts = tuple(
        (name, value.dim() if isinstance(value, torch.Tensor) else repr(value))
        for name, value in sorted(arguments.items())
    )
    return captured, None if module is None else weakref.ref(module), facts


def give_up(
    captured: CapturedFunction, arguments: Mapping[str, Any], module: nn.Module | None, given: GivenReason
) -> bool:
    """Has the next trace break the graph at a call that was declined after this one; False where it was to already."""
    key = call_key(captured, arguments, module)
    known = key in _given_up
    _given_up[key] = given
    return not known


def take_refused() -> list[Refused]:
    """The calls that were declined during the trace since this was last asked."""
    taken, _trace.refused = _trace.refused, []
    return taken


def captured_function(target: Any) -> CapturedFunction | None:
    """The captured function whose call a node's target is, or None."""
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
    parameters = inspect.signature(plain_form(function)).parameters.values()
    return tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))


def _as_function(reference: Reference, found: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """The reference as something that takes the function's arguments and returns what the function returns."""

    def adapted(**arguments: Any) -> Any:
        return found(**arguments) if reference.call is None else reference.call(found, arguments)

    if reference.callee is None:
        return adapted
    assert isinstance(function, types.FunctionType)
    names = {**function.__globals__, reference.callee: adapted}
    copy = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def install(is_ours: Callable[[], bool], levels_of_trace: Callable[[], int | None]) -> int:
    """Registers every known function of the libraries imported so far; returns how many were new.

    Args:
        is_ours: tells, while Dynamo traces, whether our backend will get the graph.
        levels_of_trace: the number of levels that the mixer being traced will have, or None for the linear operator;
            it decides the shape of the final state.
    """
    global _is_ours, _levels_of_trace, _modules_seen
    _is_ours, _levels_of_trace, _modules_seen = is_ours, levels_of_trace, len(sys.modules)
    modules = _modules()
    new = [(entry, f) for entry in entries() for f in _definitions(entry, modules) if id(f) not in _captured]
    for entry, function in new:
        applied = is_applied(function)
        captured = CapturedFunction(entry, as_function(function) if applied else unsubstituted(function))
        _captured[id(function)] = captured
        _targets.update(dict.fromkeys(captured.calls, captured))
        if applied:
            substitute_applied(function, _stand_in(captured, is_ours), is_ours)
        else:
            substitute(function, _stand_in(captured, is_ours))
    for expansion in EXPANSIONS:
        for function in [f for f in _definitions(expansion, modules) if id(f) not in _expanded]:
            _expanded[id(function)] = function
            plain = unsubstituted(function)
            substitute(function, _choice(is_ours, expansion.expand(plain), plain))
    return len(new)


def imported_since() -> bool:
    """Registers known functions of libraries that traced code has imported itself; whether there were any.

    A trace that met them before has taken their code for the user's.
    """
    return len(sys.modules) != _modules_seen and install(_is_ours, _levels_of_trace) > 0


def _choice(is_ours: Callable[[], bool], expanded: Callable[..., Any], plain: Any) -> Callable[..., Any]:
    """The expanded function under our backend, the library's own under any other."""
    ours = torch._dynamo.assume_constant_result(is_ours)

    def choice(*args: Any, **kwargs: Any) -> Any:
        return expanded(*args, **kwargs) if ours() else plain(*args, **kwargs)

    return choice


def _modules() -> Mapping[str, list[types.ModuleType]]:
    """The modules imported so far, by the package at the top of their names."""
    found: dict[str, list[types.ModuleType]] = {}
    for name, module in list(sys.modules.items()):
        found.setdefault(name.split(".", 1)[0], []).append(module)
    return found


def _definitions(entry: KnownFunction | Expansion, modules: Mapping[str, list[types.ModuleType]]) -> Iterable[Any]:
    """Every distinct function object, or autograd.Function, that is this entry's function."""
    roots = _ALIASES.get(entry.library, (entry.library,))
    seen: dict[int, Any] = {}
    for module in (m for root in roots for m in modules.get(root, ())):
        value = vars(module).get(entry.function)
        known = isinstance(value, types.FunctionType) or is_applied(value)
        if known and value.__module__.split(".")[0] in roots:
            seen[id(value)] = value
    return seen.values()


def positions_of(target: Callable[..., Any]) -> int:
    """How many arguments of a captured call the user gave without their names."""
    return captured.calls.index(target) if (captured := _targets.get(target)) else 0


def _call_node_target(captured: CapturedFunction, positions: int) -> Callable[..., Any]:
    def target(**arguments: Any) -> Any:
        return captured.lowered(arguments, positions)

    target.__name__ = target.__qualname__ = captured.entry.function
    target.__module__ = "llcompile.patterns.known.capture"
    torch._dynamo.allow_in_graph(target)
    return target


def _stand_in(captured: CapturedFunction, is_ours: Callable[[], bool]) -> Callable[..., Any]:
    names, targets, function = captured.names, captured.calls, captured.function
    kept = frozenset(captured.entry.parameters) | frozenset(inspect.signature(captured.plain).parameters)
    # Transformers hands its functions keywords of the whole model (`use_cache`), which their **kwargs swallow; what
    # FLA takes through **kwargs has a meaning, so that the entry must see it.
    keeps_all = captured.entry.opaque
    ours = torch._dynamo.assume_constant_result(is_ours)

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        if not ours():
            return function(*args, **kwargs)
        count = min(len(args), len(names))
        # A result without a name is called after the variable that first holds it. None here, or every operand would
        # be called after that one: `dict(zip(...))` has a `value` in Dynamo's own code.
        arguments = {**{names[i]: args[i] for i in range(count)}, **kwargs}
        target = targets[count]
        return target(**{name: arguments[name] for name in arguments if keeps_all or name in kept})

    return stand_in
