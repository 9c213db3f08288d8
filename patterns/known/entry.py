"""An entry in the table of known functions: how a library function's arguments map to a Mixer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from llcompile.patterns.mixer import Mixer

# What an argument tells about sequences packed in one row: the bounds [N + 1] of N sequences, the sequence [B, T] that
# each token belongs to, or something that is computed from these for a kernel's sake.
Packing = Literal["bounds", "indices", "derived"]

# How the proof draws an argument: generic values of the magnitude that the argument has in real models.
Draw = Literal[
    "normal", "positive", "key", "log_decay", "unit", "negative", "state", "step", "step_before_softplus", "step_bias"
]


@dataclass(frozen=True)
class Tensor:
    """A tensor argument: its named axes (`"B T G K"`), and how the proof draws it.

    An axis with a star (`"H *V"`) must be broadcast (stride 0): the function accepts values that differ along it, but
    the family does not. `"H.K"` is one axis that holds two, `1` an axis of size one, and `"H|H V"` two layouts that
    differ in their number of axes.
    """

    name: str
    axes: str
    draw: Draw = "normal"

    def layouts(self) -> list[tuple[str, ...]]:
        """The layouts that the function accepts, each as its axes."""
        return [tuple(layout.split()) for layout in self.axes.split("|")]

    @property
    def is_state(self) -> bool:
        """Whether it is the state that comes in."""
        return self.draw == "state"


@dataclass(frozen=True)
class Arguments:
    """The arguments of one call, by the function's own names, with its defaults filled in.

    Args:
        values: tensors (in the proof), proxies (in the rewrite) and constants.
        sizes: the size of every named axis.
        dtypes, ranks: of the tensors, because a proxy has neither.
    """

    values: Mapping[str, Any]
    sizes: Mapping[str, int]
    dtypes: Mapping[str, torch.dtype]
    ranks: Mapping[str, int]

    def __getitem__(self, name: str) -> Any:
        return self.values.get(name)

    def with_values(self, values: Mapping[str, Any]) -> Arguments:
        """The same call on other values (proxies in place of tensors, say)."""
        return Arguments(values, self.sizes, self.dtypes, self.ranks)


@dataclass(frozen=True)
class Reference:
    """The library's own torch code for a function, used in the proof if the function itself cannot run.

    Args:
        name: `module:function` in the same library.
        call: (reference, the function's arguments) -> the function's return value; None if the reference takes the
            same arguments. It raises NotImplementedError for a call that the reference does not cover.
        callee: kernel that the function calls; the function's own code runs with the reference in its place.
    """

    name: str
    call: Callable[[Callable[..., Any], Mapping[str, Any]], Any] | None = None
    callee: str | None = None


@dataclass(frozen=True)
class KnownFunction:
    """One library function that is a mixer.

    Args:
        library: package that defines it; the function's `__module__` must be in it.
        function: its name there; of an autograd.Function, the name of the class (its `apply` is what is called).
        family: its usual name in the literature.
        tensors: its tensor arguments.
        constants: its other arguments that `bind` reads.
        refuses: argument -> why a call that sets it (to neither None nor the default) is not converted.
        packing: arguments that define packed sequences. Proofs omit them: a packed call equals the function on each
            sequence alone.
        optional: arguments that some versions lack, or take through **kwargs.
        defaults: argument -> the default that the binding relies on, where the installed function has the argument.
        requires: arguments -> why this combination is not covered, or None.
        bind: arguments -> Mixer, in plain torch calls without branches on shapes, so that it runs on tensors and on
            `fx.Proxy` objects alike.
        result: (arguments, output, final state) -> the function's return value (skip connection, casts, tuples).
        returns_state: constant that requests the final state, if any.
        final_state: axes of the final state of a function that takes none.
        writes_state: argument that the function overwrites with the final state, if any.
        value_first: constants that turn the state from [..., K, V] to [..., V, K] when they are set.
        softplus: constant that says whether the step sizes go through a softplus, if any.
        opaque: the function launches kernels that a compiler cannot trace: a declined call must break the graph.
        references: used in the proof if the function itself cannot run.
    """

    library: str
    function: str
    family: str
    tensors: tuple[Tensor, ...]
    bind: Callable[[Arguments], Mixer]
    result: Callable[[Arguments, Any, Any], Any]
    constants: tuple[str, ...] = ()
    refuses: Mapping[str, str] = field(default_factory=dict)
    packing: Mapping[str, Packing] = field(default_factory=dict)
    optional: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    requires: Callable[[Arguments], str | None] | None = None
    returns_state: str | None = None
    final_state: str = ""
    writes_state: str | None = None
    value_first: tuple[str, ...] = ()
    softplus: str = "dt_softplus"
    opaque: bool = False
    references: tuple[Reference, ...] = ()

    @property
    def parameters(self) -> tuple[str, ...]:
        """Every argument that the entry knows, in no particular order."""
        return (*(t.name for t in self.tensors), *self.constants, *self.packing, *self.refuses)

    def axes(self, tensor: Tensor, rank: int, values: Mapping[str, Any]) -> tuple[str, ...] | None:
        """The axes of a tensor argument of the given rank in a call with these constants; None for a wrong rank."""
        if tensor.is_state:
            axes = self.state_axes(values)
            return axes if len(axes) == rank else None
        return next((layout for layout in tensor.layouts() if len(layout) == rank), None)

    @property
    def state(self) -> str:
        """The name of the argument that is the state that comes in; "" where there is none."""
        return next((t.name for t in self.tensors if t.is_state), "")

    def state_axes(self, values: Mapping[str, Any]) -> tuple[str, ...]:
        """The axes of a call's linear state, which are also those of the final one; () where it has none.

        Where a function takes states of several layouts, it has the one of its values' layout.
        """
        layouts = next((t.layouts() for t in self.tensors if t.is_state), [tuple(self.final_state.split())])
        number = self._variant(values) if len(layouts) > 1 else 0
        axes = layouts[number]
        return (*axes[:-2], axes[-1], axes[-2]) if any(values.get(name) for name in self.value_first) else axes

    def _variant(self, values: Mapping[str, Any]) -> int:
        """Which of their layouts a call's values have."""
        value = values.get(self.value.name)
        ranks = [len(layout) for layout in self.value.layouts()]
        return ranks.index(value.dim()) if isinstance(value, torch.Tensor) and value.dim() in ranks else 0

    def wants_state(self, arguments: Arguments) -> bool:
        """Whether this call needs the final state."""
        return self.writes_state is not None or bool(self.returns_state and arguments[self.returns_state])

    def packed_by(self, arguments: Arguments, role: Packing) -> Any:
        """The call's argument of this role, or None."""
        return next((arguments[n] for n, r in self.packing.items() if r == role and arguments[n] is not None), None)

    @property
    def value(self) -> Tensor:
        """The tensor of its values: the first that has the axis "V" last, or else (values of width one) heads."""
        first = lambda fits: next((t for t in self.tensors if not t.is_state and fits(t.layouts()[0])), None)  # noqa: E731
        found = first(lambda axes: axes[-1] == "V") or first(lambda axes: {"B", "H"} <= {*axes})
        assert found is not None, f"{self.function} has no values"
        return found

    def time_axis(self, rank: int) -> int | None:
        """Which axis of its values, and of its output, is time; None for a single token."""
        axes = self.axes(self.value, rank, {})
        return axes.index("T") if axes is not None and "T" in axes else None

    def signature_problem(self, function: Callable[..., Any]) -> str | None:
        """What the signature of `function` has that this entry was not written for, or None."""
        try:
            known = inspect.signature(function).parameters
        except (TypeError, ValueError):
            return "has no signature that can be read"
        required = [n for n in (*(t.name for t in self.tensors), *self.constants) if n not in self.optional]
        missing = [n for n in required if n not in known]
        if missing:
            return f"has no argument {', '.join(missing)}"
        for name, expected in self.defaults.items():
            if name in known and known[name].default != expected:
                return f"has {name}={known[name].default} by default, where the table expects {expected}"
        return None
