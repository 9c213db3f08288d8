"""The row of a table of known functions: how a library function's arguments bind to a Mixer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from llcompile.patterns.families import Correction, Decay
from llcompile.patterns.mixer import Mixer

# How the proof draws an argument: generic values of the magnitude that the argument has in real models.
Draw = Literal["normal", "log_decay", "unit", "negative", "state"]


@dataclass(frozen=True)
class Tensor:
    """A tensor argument: its axes, named (`"B T G K"`), and how the proof draws it.

    An axis with a star (`"H *V"`) must be a broadcast one (stride 0): the function accepts values that differ along
    it, the family does not.
    """

    name: str
    axes: str
    draw: Draw = "normal"


@dataclass(frozen=True)
class Arguments:
    """The arguments of one call, by the function's own names, with its defaults filled in."""

    values: Mapping[str, Any]
    sizes: Mapping[str, int]
    dtypes: Mapping[str, torch.dtype]

    def __getitem__(self, name: str) -> Any:
        return self.values.get(name)

    def with_values(self, values: Mapping[str, Any]) -> Arguments:
        """The same call on other values (proxies in place of tensors, say)."""
        return Arguments(values, self.sizes, self.dtypes)


@dataclass(frozen=True)
class KnownFunction:
    """One library function that is a mixer.

    Args:
        library: package that defines it; the function's `__module__` must lie in it.
        function: its name there.
        family: what the field calls it.
        tensors: its tensor arguments.
        constants: its other arguments that the binding reads.
        refuses: argument -> why a call that sets it is not converted. Setting means: not None and not the default.
        bind: arguments -> Mixer, in plain torch calls without branches on shapes, so that it runs on tensors and on
            `fx.Proxy` objects alike.
        result: (arguments, output, final state) -> what the function returns (its skip connection, casts, tuples).
        returns_state: constant that asks for the final state, if any.
        writes_state: argument that the function overwrites with the final state, if any.
        reference: `module:function` of the same library that computes the same on any device, for the proof, where
            the function itself cannot run.
    """

    library: str
    function: str
    family: str
    decay: Decay
    correction: Correction
    tensors: tuple[Tensor, ...]
    bind: Callable[[Arguments], Mixer]
    result: Callable[[Arguments, Any, Any], Any]
    constants: tuple[str, ...] = ()
    refuses: Mapping[str, str] = field(default_factory=dict)
    returns_state: str | None = None
    writes_state: str | None = None
    reference: str | None = None

    @property
    def parameters(self) -> tuple[str, ...]:
        """Every argument that the row knows, in no particular order."""
        return (*(t.name for t in self.tensors), *self.constants, *self.refuses)

    def wants_state(self, arguments: Arguments) -> bool:
        """Whether this call needs the final state."""
        return self.writes_state is not None or bool(self.returns_state and arguments[self.returns_state])

    def tensor_with(self, axis: str) -> Tensor:
        """The first tensor that has the given axis last (its value, for "V")."""
        return next(t for t in self.tensors if t.draw != "state" and t.axes.split()[-1] == axis)

    def signature_problem(self, function: Callable[..., Any]) -> str | None:
        """Why `function` does not have the signature that this row was written for, or None."""
        try:
            known = inspect.signature(function).parameters
        except (TypeError, ValueError):
            return f"{self.function} has no signature that can be read"
        missing = [n for n in (*(t.name for t in self.tensors), *self.constants) if n not in known]
        if missing:
            return f"{self.function} of the installed {self.library} has no argument {', '.join(missing)}"
        return None
