"""Classify: tells what each live-in of a part is, by what the part is as a function of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from llcompile.patterns import reasons
from llcompile.patterns.reasons import GivenReason
from llcompile.patterns.structure.lifted import LiveIn
from llcompile.patterns.structure.probe import SAME, Probe, difference
from llcompile.patterns.structure.sizing import CannotArrange, arrange


class Rejection(Exception):
    """The part is no mixer of ours; the first property that failed.

    Args:
        given: that property, as a reason.
        near: whether the part looks like a mixer otherwise, so that a person wants to read of it.
        open: whether it looks at the past and at the token itself, as a mixer does, so that another cut may show one.
    """

    def __init__(self, given: GivenReason, near: int = 0, open: bool = False) -> None:
        super().__init__(given.text)
        self.given, self.near, self.open = given, near, open


@dataclass
class Roles:
    """What is known of the live-ins before the operands are tried.

    Args:
        query: linear, each position by itself, contracted.
        keyed: live-ins with the query's contracted dims, that later positions depend on.
        value: linear, causal, its dims pass through.
        scalars: the other causal live-ins.
        timeless: live-ins without time that are not `post`.
        strict: those which only later positions depend on.
        degree: live-in -> 1 linear, 0 scale-free, -1 inverse, None otherwise.
        post: what is done to the output.
        first: the state that the sum starts from; the probe has zeros there.
        aside: where the result is affine in the query, live-ins that only what is left without queries depends on; the
            probe leaves that away.
        scale_free: the result does not change with the query's size (a denominator inside).
    """

    query: LiveIn
    keyed: list[LiveIn]
    value: LiveIn | None
    scalars: list[LiveIn]
    timeless: list[LiveIn]
    strict: set[LiveIn]
    degree: dict[LiveIn, int | None]
    post: list[tuple[LiveIn, str]] = field(default_factory=list)
    linear_query: bool = True
    first: LiveIn | None = None
    aside: tuple[LiveIn, ...] | None = None


def classify(probe: Probe) -> Roles:
    """The roles of the part's live-ins.

    Raises:
        Rejection: with the first property that does not hold.
    """
    classifier = _Classifier(probe)
    try:
        return classifier.roles()
    except Rejection as rejection:
        reach = set(classifier.reach.values())
        rejection.open = "from" in reach and reach.isdisjoint(["window", "before"])
        raise


def sees_itself(probe: Probe) -> bool:
    """Whether positions of the result depend on the same position of some live-in.

    Raises:
        Rejection: one depends on a later position.
    """
    classifier, itself = _Classifier(probe), False
    for live_in in (s for s in probe.subgraph.live_ins if probe.values[s].is_floating_point() and probe.is_timed(s)):
        for position in {1, probe.length // 2, probe.length - 1}:
            rows = classifier.reached(live_in, position)
            if rows and rows[0] < position:
                raise Rejection(reasons.NOT_CAUSAL(output=rows[0], input=position))
            itself |= position in rows
    return itself


class _Classifier:
    def __init__(self, probe: Probe) -> None:
        self.probe = probe
        self.base = probe.by_time(probe.run())
        if not bool(torch.isfinite(self.base).all()):
            raise Rejection(reasons.NOT_FINITE())
        self.kept = {id(dim) for row in probe.result for dim in row}
        self.dims = {s: {id(a) for row in probe.rows[s] for a in row} for s in probe.subgraph.live_ins}
        self.post: list[tuple[LiveIn, str]] = []
        self.degree: dict[LiveIn, int | None] = {}
        self.reach: dict[LiveIn, str] = {}

    def roles(self) -> Roles:
        probe = self.probe
        live_ins = [s for s in probe.subgraph.live_ins if probe.values[s].is_floating_point()]
        if len(live_ins) < len(probe.subgraph.live_ins):
            raise Rejection(reasons.WHOLE_NUMBERS())
        timed = [s for s in live_ins if probe.is_timed(s)]
        if len(timed) < 2:
            raise Rejection(reasons.FEW_SEQUENCES())
        self._reaches(timed)
        contracted = [s for s in timed if self.reach[s] == "own" and self.dims[s] - self.kept]
        if not contracted:
            raise Rejection(self.noncausal or reasons.NO_QUERY())
        if len(contracted) > 1:
            raise Rejection(reasons.TWO_QUERIES())
        query = contracted[0]
        first = next((s for s in live_ins if self._starts_from(s, query)), None)
        for live_in in [s for s in live_ins if s is not query and self._is_outer(s)]:
            self._take_post(live_in)
        aside = self._aside(query, live_ins)
        live_ins = [s for s in live_ins if s is not first and s not in (aside or ())]
        for live_in in live_ins:
            if live_in not in self.degree:
                self.degree[live_in] = self._degree(live_in)
        return replace(self._sort(query, live_ins), first=first, aside=aside)

    def _starts_from(self, live_in: LiveIn, query: LiveIn) -> bool:
        """Whether a learned live-in is added to the state that the query meets; if so, it is made zero."""
        probe, x = self.probe, self.probe.values[live_in]
        inner, outer = self.dims[query] - self.kept, self.kept - self.dims[query]
        if live_in not in probe.subgraph.learned or not (self.dims[live_in] & inner and self.dims[live_in] & outer):
            return False
        without, twice = (probe.by_time(probe.run({live_in: x * factor})) for factor in (0, 2))
        added = self.base - without
        if min(_size(without), _size(added)) < 1e-6 * _size(self.base) or difference(twice - self.base, added) > 1e-6:
            return False
        probe.values[live_in], self.base = torch.zeros_like(x), without
        return True

    def _aside(self, query: LiveIn, live_ins: list[LiveIn]) -> tuple[LiveIn, ...] | None:
        """Where the result is affine in the query: the live-ins that only what is left without queries depends on.

        From here on the probe leaves that away.
        """
        probe, x = self.probe, self.probe.values[query]
        left, twice = (probe.by_time(probe.run({query: x * factor})) for factor in (0, 2))
        if not bool(torch.isfinite(left).all()) or _size(left) < 1e-9 * _size(self.base):
            return None
        if _size(self.base - left) < 1e-6 * _size(self.base) or difference(twice - left, 2 * (self.base - left)) > 1e-6:
            return None
        probe.linear_in, self.base = query, self.base - left
        same = lambda s: difference(probe.by_time(probe.run({s: probe.draw(s)})), self.base) < SAME  # noqa: E731
        return tuple(s for s in live_ins if s is not query and same(s))

    def _is_outer(self, live_in: LiveIn) -> bool:
        return self.reach.get(live_in, "own") == "own" and not self.dims[live_in] - self.kept

    def _reaches(self, timed: list[LiveIn]) -> None:
        """Which positions of the result depend on one position of each live-in."""
        probe = self.probe
        # Of two positions, the first has a later one, and the second an earlier one.
        middle = 0 if probe.length == 2 else probe.length // 2
        noncausal = None
        for live_in in timed:
            rows = self.reached(live_in, middle)
            if probe.length == 2 and self.reached(live_in, 1)[:1] == [0]:
                self.reach[live_in] = "before"
                noncausal = noncausal or reasons.NOT_CAUSAL(output=0, input=1)
            elif not rows:
                # Of two tokens the first has no past that could decay; of more, none in the middle is without one.
                last = probe.length == 2 and self.reached(live_in, 1) == [1]
                self.reach[live_in] = "from" if last else "none"
            elif rows == [middle]:
                self.reach[live_in] = "own"
            elif rows[0] < middle:
                self.reach[live_in] = "before"
                noncausal = noncausal or reasons.NOT_CAUSAL(output=rows[0], input=middle)
            else:
                self.reach[live_in] = "later" if rows[0] > middle else "from"
                if rows[-1] < probe.length - 1:
                    self.reach[live_in] = "window"
        self.noncausal = noncausal

    def reached(self, live_in: LiveIn, position: int) -> list[int]:
        """The positions of the result that depend on one position of a live-in."""
        other = self.probe.by_time(self.probe.run({live_in: self.probe.at_one_time(live_in, position)}))
        size = self.base.abs().amax().clamp_min(1e-300)
        found: list[int] = ((other - self.base).abs().amax(1) > 1e-11 * size).nonzero().flatten().tolist()
        return found

    def _degree(self, live_in: LiveIn) -> int | None:
        """How the result grows with the live-in: 1 where twice the live-in gives twice the result."""
        twice = self.probe.by_time(self.probe.run({live_in: 2 * self.probe.values[live_in]}))
        for degree in (1, 0, -1, 2):
            if difference(twice, self.base * 2.0**degree) < SAME:
                return degree
        return None

    def _take_post(self, live_in: LiveIn) -> None:
        """A live-in that is added to the output, or that the output is multiplied with or divided by."""
        probe = self.probe
        x = probe.values[live_in]
        other = probe.draw(live_in)
        changed = probe.by_time(probe.run({live_in: other}))
        try:
            one, two = (self._spread(live_in, t) for t in (x, other))
        except CannotArrange:
            return
        if difference(changed - self.base, two - one) < 1e-6 and difference(changed, self.base + two - one) < SAME:
            self.post.append((live_in, "plus"))
            probe.values[live_in] = torch.zeros_like(x)
            self.base = probe.by_time(probe.run())
        elif difference(changed * one, self.base * two) < SAME:
            self.post.append((live_in, "times"))
        elif difference(changed * two, self.base * one) < SAME:
            self.post.append((live_in, "over"))
        elif difference(changed * one.exp(), self.base * two.exp()) < SAME:
            self.post.append((live_in, "times exp"))
        elif difference(changed * two.exp(), self.base * one.exp()) < SAME:
            self.post.append((live_in, "over exp"))
        else:
            return
        self.degree[live_in] = 1

    def _spread(self, live_in: LiveIn, x: Tensor) -> Tensor:
        probe = self.probe
        full = arrange(x, probe.rows[live_in], probe.result, probe.sizing.of)
        return probe.by_time(full)

    def _sort(self, query: LiveIn, live_ins: list[LiveIn]) -> Roles:
        taken = {id(s) for s, _ in self.post} | {id(query)}
        left = [s for s in live_ins if id(s) not in taken]
        idle = [s for s in left if self.reach.get(s) == "none"]
        if idle:
            raise Rejection(reasons.IDLE_SOURCE())
        contracted = self.dims[query] - self.kept
        timed = [s for s in left if s in self.reach]
        values = [s for s in timed if self.degree[s] == 1 and not self.dims[s] & contracted]
        values = [s for s in values if self.reach[s] != "own"]
        inner = self.dims[query].union(*(self.dims[s] for s in timed if s not in values))
        # The value's own dims pass through to the result; those of scores do not have them.
        values.sort(key=lambda s: -len((self.dims[s] & self.kept) - inner))
        near = 2 if values or self.degree[query] == 1 else 0
        if self.noncausal:
            raise Rejection(self.noncausal, near)
        stray = [s for s in timed if self.reach[s] == "own"]
        if stray:
            raise Rejection(reasons.STRAY_SOURCE(), near)
        if self.degree[query] != 1 and not values:
            raise Rejection(reasons.NOT_LINEAR())
        keyed = [s for s in timed if self.dims[s] & contracted]
        if not keyed:
            raise Rejection(reasons.NO_KEY())
        value = values[0] if values and (self.dims[values[0]] & self.kept) - inner else None
        if value is None and self._has_value_dims(query, keyed):
            raise Rejection(reasons.NOT_LINEAR_IN_VALUE(), 2)
        scalars = [s for s in timed if s is not value and s not in keyed]
        strict = {s for s in timed if self.reach[s] == "later"}
        windowed = [s for s in timed if self.reach[s] == "window"]
        if value in windowed and self._really_ends(value):
            raise Rejection(reasons.SLIDING_WINDOW(output=self.probe.length - 1, input=self.probe.length // 2), near)
        if value in strict:
            raise Rejection(reasons.STRICTLY_CAUSAL(), near)
        timeless = [s for s in left if s not in self.reach]
        return Roles(
            query, keyed, value, scalars, timeless, strict, self.degree, self.post, linear_query=self.degree[query] == 1
        )

    def _really_ends(self, value: LiveIn) -> bool:
        """Whether a value's reach ends, and is not only lost to rounding under a strong decay."""
        probe, middle = self.probe, self.probe.length // 2
        # In proportion to the value, however large it is; what is left of it at the end is no less than this.
        changed = probe.values[value] + 1e200 * (probe.at_one_time(value, middle) - probe.values[value])
        last = probe.by_time(probe.run({value: changed}))[-1]
        return float((last - self.base[-1]).abs().amax()) < 1e-9 * float(self.base[-1].abs().amax())

    def _has_value_dims(self, query: LiveIn, keyed: list[LiveIn]) -> bool:
        """Whether the result has dims that neither queries nor keys have, and no other live-in brings linearly."""
        return bool(self.kept - self.dims[query].union(*(self.dims[s] for s in keyed)) - self._plain_dims())

    def _plain_dims(self) -> set[int]:
        return {id(a) for s, how in self.post for row in self.probe.rows[s] for a in row}


def _size(x: Tensor) -> float:
    return float(x.abs().max())
