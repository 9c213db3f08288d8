"""Observations: what runs of a subgraph show: reaches, weights, which live-in is which. Each is measured once."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from llcompile.patterns import reasons
from llcompile.patterns.reasons import GivenReason
from llcompile.patterns.structure.axes import Axis, Dim, shared
from llcompile.patterns.structure.lifted import LiveIn
from llcompile.patterns.structure.probe import Probe

SEEN = 1e-7  # a relative difference that is not rounding
_DEPENDS = (
    1e-11  # a change, in proportion to the largest number of the result, which shows that it depends on something
)

Changes = Mapping[LiveIn, Tensor]


class Observations:
    """A subgraph under a probe, with one draw. Which live-in would be which is read off what it does.

    Args:
        probe: the subgraph, with one draw.
        origins: live-in -> the other live-ins that the code computes it from.
    """

    def __init__(self, probe: Probe, origins: Mapping[LiveIn, set[LiveIn]] | None = None) -> None:
        self.probe, self.origins = probe, origins or {}
        self.length, self.middle = probe.length, probe.length // 2
        self.kept = set(probe.rest)
        self.live_ins = [s for s in probe.subgraph.live_ins if probe.values[s].is_floating_point()]
        self.timed = [s for s in self.live_ins if probe.is_timed(s)]
        self._others: dict[tuple[LiveIn, int], Tensor] = {}
        self._reaches: dict[tuple[LiveIn, int], list[int]] = {}

    def run(self, changed: Changes | None = None) -> Tensor:
        """The result, [T, everything else]."""
        return self.probe.outputs(changed)

    @functools.cached_property
    def base(self) -> Tensor:
        """The result on the probe's own draw."""
        return self.run()

    def rebase(self, base: Tensor) -> None:
        """The result from here on, where a live-in was made zero or the probe leaves something away."""
        self.base = base
        self._reaches.clear()

    def dims(self, live_in: LiveIn) -> Axis:
        """The live-in's axes but time."""
        analysis = self.probe.sizing.analysis
        return tuple(a for axis in self.probe.axes[live_in] for a in axis if not analysis.is_time(a))

    @functools.cached_property
    def paired(self) -> set[Dim]:
        """The axes along which two sequences meet and that the result does not have."""
        return shared([set(self.dims(s)) - self.kept for s in self.timed])

    def is_paired(self, live_in: LiveIn) -> bool:
        """Whether the live-in meets another one along an axis that the result does not have."""
        return not self.paired.isdisjoint(self.dims(live_in))

    # -- what the result depends on

    def reach(self, live_in: LiveIn, position: int) -> list[int]:
        """The positions of the result that depend on one position of a live-in."""
        key = (live_in, position)
        if key not in self._reaches:
            changed = (self.run({live_in: self.other(live_in, position)}) - self.base).abs().amax(1)
            least = _DEPENDS * self.base.abs().amax().clamp_min(1e-300)
            self._reaches[key] = (changed > least).nonzero().flatten().tolist()
        return self._reaches[key]

    def looks_ahead(self, live_in: LiveIn, position: int) -> GivenReason | None:
        """The reason where an earlier position of the result depends on this position of a live-in."""
        reached = self.reach(live_in, position)
        ahead = bool(reached) and reached[0] < position
        return reasons.NOT_CAUSAL(output=reached[0], input=position) if ahead else None

    def other(self, live_in: LiveIn, position: int) -> Tensor:
        """The live-in with other numbers at one position, the same ones each time."""
        key = (live_in, position)
        if key not in self._others:
            self._others[key] = self.probe.at_one_time(live_in, position)
        return self._others[key]

    @functools.cached_property
    def readers(self) -> list[LiveIn]:
        """The live-ins that act on the output of their own position alone."""
        return [s for s in self.timed if self.reach(s, self.middle) == [self.middle] and self.reach(s, 0) in ([], [0])]

    @property
    def pointwise(self) -> bool:
        """Whether every live-in acts at its own position alone."""
        return len(self.readers) == len(self.timed)

    @functools.cached_property
    def query(self) -> LiveIn | None:
        """What is read with: it acts at its own position, and meets another live-in along an axis that is summed."""
        found = [s for s in self.readers if self.is_paired(s)]
        # Of two, the one that the result is a sum of.
        found.sort(key=lambda s: (not self.is_additive(s), -len(self.dims(s))))
        return found[0] if found else None

    @functools.cached_property
    def value(self) -> LiveIn | None:
        """What is summed up: the result is a sum of it, over positions, and it meets no other live-in."""
        found = filter(self.is_additive, self.summable)
        return max(found, key=lambda s: len(self.dims(s)), default=None)

    @functools.cached_property
    def summable(self) -> list[LiveIn]:
        """What acts on later positions and meets no other live-in: values and gates."""
        return [s for s in self.timed if s not in self.readers and not self.is_paired(s)]

    @functools.cached_property
    def keys(self) -> list[LiveIn]:
        """What meets the query and acts on later positions."""
        held = self.paired.intersection(self.dims(self.query)) if self.query is not None else set()
        return [s for s in self.timed if s not in self.readers and not held.isdisjoint(self.dims(s))]

    def is_additive(self, live_in: LiveIn) -> bool:
        """Whether the result is a sum over what the live-in is a sum of (and something that stays)."""
        one, two = self.probe.values[live_in], self._second(live_in)
        nothing = self.run({live_in: torch.zeros_like(one)})
        apart = self.base + self.run({live_in: two}) - nothing
        together = self.run({live_in: one + two})
        size = max(float(x.abs().max()) for x in (apart, together, nothing))
        return float((together - apart).abs().max()) < SEEN * size

    def _second(self, live_in: LiveIn) -> Tensor:
        key = (live_in, -1)
        if key not in self._others:
            self._others[key] = self.probe.draw(live_in)
        return self._others[key]

    @functools.cached_property
    def normalised(self) -> bool:
        """Whether the size of a query does not matter, where it is large: the output is divided by its scores."""
        if self.query is None:
            return False
        one, two = (self.run({self.query: size * self.probe.values[self.query]}) for size in (1e7, 2e7))
        return float((two - one).abs().max()) < 1e-5 * float(one.abs().max())

    # -- the weights that values come in with

    def weights(self, position: int, changed: Changes | None = None) -> Tensor:
        """What the value at one position alone adds to the results, [T, N]."""
        assert self.value is not None
        own, other = self.probe.values[self.value], self.other(self.value, position)
        alone = torch.where(other != own, other, torch.zeros_like(own))
        with_it = self.run({**(changed or {}), self.value: alone})
        return with_it - self.run({**(changed or {}), self.value: torch.zeros_like(own)})

    def weights_at(self, positions: Sequence[int], at: int, changed: Changes | None = None) -> Tensor:
        """The weights of some positions in one result, [N, positions]."""
        return torch.stack([self.weights(p, changed)[at] for p in positions], dim=-1)

    def along(self, live_in: LiveIn, dims: Sequence[Dim], index: int, number: float = 1.0) -> Tensor:
        """Numbers of the live-in's shape that are zero but at one index along some of its axes."""
        mask = torch.zeros(math.prod(map(self.probe.sizing.of, dims)), dtype=torch.float64)
        mask[index] = number
        return self.probe.spread(mask, tuple(dims), live_in).to(self.probe.dtype).contiguous()

    def contracted(self, live_in: LiveIn) -> tuple[Dim, ...]:
        """The live-in's axes that it is summed over with another."""
        return tuple(a for a in self.dims(live_in) if a in self.paired)
