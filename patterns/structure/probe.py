"""Probe: runs a subgraph on random numbers and sees what its result depends on."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from llcompile.patterns.boundary import running
from llcompile.patterns.structure.axes import Axes, Axis, dims_of
from llcompile.patterns.structure.cut import Subgraph
from llcompile.patterns.structure.execute import function_of
from llcompile.patterns.structure.lifted import LiveIn, sample_of
from llcompile.patterns.structure.program import Value
from llcompile.patterns.structure.ranges import Range
from llcompile.patterns.structure.sizing import Sizing, arrange

_WIDE, _FAR = 100.0, 8.0
SAME = 1e-8  # relative difference up to which two float64 results are the same


class Probe:
    """A subgraph at one choice of sizes, with one draw of its live-ins.

    Args:
        subgraph: the subgraph.
        axes: live-in -> its axes.
        result: the axes of its result.
        sizing: the sizes.
        ranges: live-in -> the range of its numbers.
        seed: of the draw.
    """

    def __init__(
        self,
        subgraph: Subgraph,
        axes: Mapping[LiveIn, Axes],
        result: Axes,
        sizing: Sizing,
        ranges: Mapping[LiveIn, Range],
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.subgraph, self.axes, self.result, self.sizing, self.ranges = subgraph, axes, result, sizing, ranges
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(seed)
        self.values = {live_in: self.draw(live_in) for live_in in subgraph.live_ins}
        # With all numbers as traced, the arguments stand as they are.
        self.resizes = any(sizing.of(leaf) != leaf.size for leaf in self._leaves())
        self.linear_in: LiveIn | None = None  # of what the subgraph computes, only what this live-in has a part in

    def _leaves(self) -> list:  # type: ignore[type-arg]
        analysis = self.sizing.analysis
        values = dict.fromkeys(v for op in self.subgraph.ops for v in (*op.inputs, *op.outputs))
        return [leaf for v in values for axis in analysis.followed.axes[v] for leaf in analysis.axis_leaves(axis)]

    @property
    def length(self) -> int:
        """The number of positions."""
        return self.sizing.length

    def shape(self, live_in: LiveIn) -> tuple[int, ...]:
        """The shape of a live-in at these sizes."""
        of = self.sizing.of
        return tuple(math.prod(map(of, axis)) for axis in self.axes[live_in])

    def draw(self, live_in: LiveIn) -> Tensor:
        """Generic numbers in the live-in's range."""
        dtype = sample_of(live_in).dtype
        shape = self.shape(live_in)
        if not dtype.is_floating_point:
            whole = torch.randint(0, 2, shape, generator=self.generator)
            return whole.to(dtype)
        z = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return within(z, self.ranges[live_in]).to(self.dtype)

    def run(self, changed: Mapping[LiveIn, Tensor] | None = None) -> Tensor:
        """The result, with some live-ins changed."""
        numbers = {**self.values, **(changed or {})}
        result, own = self._run(numbers), self.linear_in
        return result if own is None else result - self._run({**numbers, own: torch.zeros_like(numbers[own])})

    def _run(self, numbers: Mapping[LiveIn, Tensor]) -> Tensor:
        function, read = self._function
        given = [numbers[s] if isinstance(s, Value) else numbers[s][position] for s, position in read]
        with running(self.subgraph.result), _same_draws() if self.subgraph.random is not None else nullcontext():
            return function(*given).to(self.dtype)

    @contextmanager
    def changed(self, changes: Mapping[LiveIn, Tensor]) -> Iterator[None]:
        """Other numbers for some live-ins, for a while."""
        kept, self.values = self.values, {**self.values, **changes}
        try:
            yield
        finally:
            self.values = kept

    def numbers_of(self, value: Value) -> Tensor:
        """The numbers of a value inside of the subgraph."""
        _, read = self._function
        function = self._written(value)
        given = [self.values[s] if isinstance(s, Value) else self.values[s][position] for s, position in read]
        with running(value):
            return function(*given).to(self.dtype)

    @functools.cached_property
    def _function(self) -> tuple[Callable[..., Tensor], list[tuple[LiveIn, int]]]:
        """The subgraph as a function, and which live-in, at which position, each of its arguments is."""
        inputs: dict[Value, tuple[LiveIn, int]] = {}
        for live_in in self.subgraph.live_ins:
            if isinstance(live_in, Value):
                inputs[live_in] = (live_in, 0)
            else:
                inputs.update((value, (live_in, position)) for value, position in self.subgraph.taps[live_in].items())
        self._inputs = list(inputs)
        return self._written(self.subgraph.result), list(inputs.values())

    def _written(self, value: Value) -> Callable[..., Tensor]:
        """The subgraph up to a value, as a function of its inputs."""
        sizes = self.sizing.shape if self.resizes else None
        key = (value, self.dtype, self.resizes and frozenset(self.sizing.sizes.items()))
        known = self.subgraph.functions
        if key not in known:
            known[key] = function_of(self.subgraph.ops, self._inputs, value, sizes, self.dtype)
        return known[key]

    def outputs(self, changed: Mapping[LiveIn, Tensor] | None = None) -> Tensor:
        """The result with some live-ins changed, as [T, everything else]."""
        return self.by_time(self.run(changed))

    def by_time(self, x: Tensor) -> Tensor:
        """A result as [T, everything else]."""
        return arrange(x, self.result, (self.sizing.analysis.leaves, self.rest), self.sizing.of)

    @functools.cached_property
    def rest(self) -> Axis:
        """The dims of the result but time."""
        return tuple(dim for axis in self.result for dim in axis if not self.sizing.analysis.is_time(dim))

    def is_timed(self, live_in: LiveIn) -> bool:
        """Whether a live-in has time."""
        return any(map(self.sizing.analysis.is_time, dims_of(self.axes[live_in])))

    def at_one_time(self, live_in: LiveIn, position: int) -> Tensor:
        """The live-in with other numbers at one position."""
        mask = torch.zeros(self.length, dtype=torch.bool)
        mask[position] = True
        where = self.spread(mask, self.sizing.analysis.leaves, live_in)
        return torch.where(where, self.draw(live_in), self.values[live_in])

    def spread(self, x: Tensor, dims: Axis, live_in: LiveIn) -> Tensor:
        """Numbers along some dims in the shape of a live-in."""
        own = tuple((dim,) for axis in self.axes[live_in] for dim in axis)
        return arrange(x, (dims,), own, self.sizing.of).reshape(self.shape(live_in))


@contextmanager
def _same_draws() -> Iterator[None]:
    """Random operations draw the same each time, and the user's generator is as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield


def within(z: Tensor, bounds: Range) -> Tensor:
    """Standard normal numbers as generic numbers in a range, away from its ends, of both signs where it has them."""
    low, high = bounds
    if high - low > _WIDE:  # one end at most is felt
        low, high = (-math.inf if low < -_FAR else low), (math.inf if high > _FAR else high)
    if math.isinf(low) and math.isinf(high):
        return z
    unit = torch.sigmoid(1.3 * z)
    if math.isinf(high) and low < 0:
        return low + torch.nn.functional.softplus(z + _zero_at(-low))
    if math.isinf(low) and high > 0:
        return high - torch.nn.functional.softplus(_zero_at(high) - z)
    if math.isinf(high):
        return low + 0.1 + torch.nn.functional.softplus(z)
    if math.isinf(low):
        return high - 0.03 - 0.4 * torch.nn.functional.softplus(z)
    return low + (high - low) * (0.1 + 0.8 * unit)


def _zero_at(size: float) -> float:
    """Where a softplus is as large as this."""
    return math.log(math.expm1(size)) if size < 30 else size
