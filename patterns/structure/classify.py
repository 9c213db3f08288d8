"""Classify: tells what each live-in of a subgraph is, by what the subgraph is as a function of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from llcompile.patterns import reasons
from llcompile.patterns.agreement import difference
from llcompile.patterns.reasons import GivenReason
from llcompile.patterns.structure.axes import Dim
from llcompile.patterns.structure.lifted import LiveIn
from llcompile.patterns.structure.observations import Observations
from llcompile.patterns.structure.probe import SAME
from llcompile.patterns.structure.sizing import CannotArrange, arrange


class Rejection(Exception):
    """The subgraph is no mixer of ours; the first property that failed.

    Args:
        given: that property, as a reason.
        near: whether the subgraph looks like a mixer otherwise, so that a person wants to read of it.
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
        bonus: live-ins with these dims that no other position depends on, or without time.
        value: linear, causal, its dims pass through.
        scalars: the other causal live-ins.
        timeless: live-ins without time that are not `post`.
        strict: those which only later positions depend on.
        degree: live-in -> 1 linear, 0 scale-free, -1 inverse, None otherwise.
        post: what is done to the output.
        first: the state that the sum starts from; the probe has zeros there.
        aside: where the result is affine in the query, live-ins that only what is left without queries depends on; the
            probe leaves that away.
        narrow: the value is of heads of width one, each with a decay per channel of the key (Mamba-1's channels).
        linear_query: twice the query gives twice the result; else there is a denominator inside.
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
    bonus: list[LiveIn] = field(default_factory=list)
    narrow: bool = False
    first: LiveIn | None = None
    aside: tuple[LiveIn, ...] | None = None


def classify(measured: Observations) -> Roles:
    """The roles of the subgraph's live-ins.

    Raises:
        Rejection: with the first property that does not hold.
    """
    classifier = _Classifier(measured)
    try:
        return classifier.roles()
    except Rejection as rejection:
        reach = set(classifier.reach.values())
        rejection.open = "from" in reach and reach.isdisjoint(["window", "before"])
        raise


def sees_itself(measured: Observations) -> bool:
    """Whether positions of the result depend on the same position of some live-in.

    Raises:
        Rejection: one depends on a later position.
    """
    _expect_finite(measured)
    itself = False
    for live_in in measured.timed:
        for position in {1, measured.middle, measured.length - 1}:
            ahead = measured.looks_ahead(live_in, position)
            if ahead is not None:
                raise Rejection(ahead)
            itself |= position in measured.reach(live_in, position)
    return itself


def _expect_finite(measured: Observations) -> None:
    if not bool(torch.isfinite(measured.base).all()):
        raise Rejection(reasons.NOT_FINITE())


class _Classifier:
    def __init__(self, measured: Observations) -> None:
        _expect_finite(measured)
        self.measured, self.probe = measured, measured.probe
        self.kept = measured.kept
        self.dims: dict[LiveIn, set[Dim]] = {s: set(measured.dims(s)) for s in measured.live_ins}
        self.post: list[tuple[LiveIn, str]] = []
        self.degree: dict[LiveIn, int | None] = {}
        self.reach: dict[LiveIn, str] = {}
        self.noncausal: GivenReason | None = None

    def roles(self) -> Roles:
        live_ins, timed = self.measured.live_ins, self.measured.timed
        if len(live_ins) < len(self.probe.subgraph.live_ins):
            raise Rejection(reasons.WHOLE_NUMBERS())
        if len(timed) < 2:
            raise Rejection(reasons.FEW_SEQUENCES())
        for live_in in timed:
            self.reach[live_in] = self._reach_of(live_in)
        contracted = [s for s in timed if self.reach[s] == "own" and self.dims[s] - self.kept]
        if not contracted:
            raise Rejection(self.noncausal or reasons.NO_QUERY())
        if len(contracted) > 1:  # the weight of the own token may be another one
            contracted = [s for s in contracted if self._degree(s) == 1]
        if len(contracted) != 1:
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
        return replace(self._sorted(query, live_ins), first=first, aside=aside)

    def _run(self, live_in: LiveIn, x: Tensor) -> Tensor:
        """The result with one live-in changed."""
        return self.measured.run({live_in: x})

    def _starts_from(self, live_in: LiveIn, query: LiveIn) -> bool:
        """Whether a learned live-in is added to the state that the query meets; if so, it is made zero."""
        probe, x, base = self.probe, self.probe.values[live_in], self.measured.base
        inner, outer = self.dims[query] - self.kept, self.kept - self.dims[query]
        if live_in not in probe.subgraph.learned or not (self.dims[live_in] & inner and self.dims[live_in] & outer):
            return False
        without, twice = self._run(live_in, 0 * x), self._run(live_in, 2 * x)
        added = base - without
        if min(_size(without), _size(added)) < 1e-6 * _size(base) or difference(twice - base, added) > 1e-6:
            return False
        probe.values[live_in] = torch.zeros_like(x)
        self.measured.rebase(without)
        return True

    def _aside(self, query: LiveIn, live_ins: list[LiveIn]) -> tuple[LiveIn, ...] | None:
        """Where the result is affine in the query: the live-ins that only what is left without queries depends on.

        From here on the probe leaves that away.
        """
        probe, x, base = self.probe, self.probe.values[query], self.measured.base
        left, twice = self._run(query, 0 * x), self._run(query, 2 * x)
        if not bool(torch.isfinite(left).all()) or _size(left) < 1e-9 * _size(base):
            return None
        added = base - left
        if _size(added) < 1e-6 * _size(base) or difference(twice - left, 2 * added) > 1e-6:
            return None
        probe.linear_in = query
        self.measured.rebase(added)
        same = lambda s: difference(self._run(s, probe.draw(s)), added) < SAME  # noqa: E731
        return tuple(s for s in live_ins if s is not query and same(s))

    def _is_outer(self, live_in: LiveIn) -> bool:
        return self.reach.get(live_in, "own") == "own" and not self.dims[live_in] - self.kept

    def _reach_of(self, live_in: LiveIn) -> str:
        """Which positions of the result depend on one position of a live-in."""
        # Of two positions, the first has a later one, and the second an earlier one.
        middle, last = (0, 1) if self.measured.length == 2 else (self.measured.middle, self.measured.length - 1)
        reached, early = self.measured.reach(live_in, middle), self.measured.looks_ahead(live_in, middle)
        if early is None and last == 1:
            early = self.measured.looks_ahead(live_in, last)
        if early is not None:
            self.noncausal = self.noncausal or early
            return "before"
        if not reached:
            # Of two tokens the first has no past that could decay; of more, none in the middle is without one.
            return "from" if last == 1 and self.measured.reach(live_in, last) == [last] else "none"
        if reached == [middle]:
            return "own"
        if reached[-1] < last:
            return "window"
        return "later" if reached[0] > middle else "from"

    def _degree(self, live_in: LiveIn) -> int | None:
        """How the result grows with the live-in: 1 where twice the live-in gives twice the result."""
        twice = self._run(live_in, 2 * self.probe.values[live_in])
        for degree in (1, 0, -1, 2):
            if difference(twice, self.measured.base * 2.0**degree) < SAME:
                return degree
        return None

    def _take_post(self, live_in: LiveIn) -> None:
        """A live-in that is added to the output, or that the output is multiplied with or divided by."""
        probe, base = self.probe, self.measured.base
        x, other = probe.values[live_in], probe.draw(live_in)
        changed = self._run(live_in, other)
        try:
            one, two = (self._spread(live_in, t) for t in (x, other))
        except CannotArrange:
            return
        if difference(changed - base, two - one) < 1e-6 and difference(changed, base + two - one) < SAME:
            self.post.append((live_in, "plus"))
            probe.values[live_in] = torch.zeros_like(x)
            self.measured.rebase(self.measured.run())
            self.degree[live_in] = 1
            return
        for how, function, divides in _FACTORS:
            before, after = map(function, (two, one) if divides else (one, two))
            if difference(changed * before, base * after) < SAME:
                self.post.append((live_in, how))
                self.degree[live_in] = 1
                return

    def _spread(self, live_in: LiveIn, x: Tensor) -> Tensor:
        probe = self.probe
        full = arrange(x, probe.axes[live_in], probe.result, probe.sizing.of)
        return probe.by_time(full)

    def _sorted(self, query: LiveIn, live_ins: list[LiveIn]) -> Roles:
        """The roles, by what the live-ins have shown."""
        taken = {query, *(s for s, _ in self.post)}
        left = [s for s in live_ins if s not in taken]
        timed = [s for s in left if s in self.reach]
        contracted = self.dims[query] - self.kept
        keyed = [s for s in timed if self.dims[s] & contracted and self.reach[s] != "own"]
        bonus = [s for s in left if self.dims[s] & contracted and s not in keyed and self._acts_at_first(s)]
        values = [s for s in timed if s not in (*keyed, *bonus) and self.degree[s] == 1 and self.reach[s] != "own"]
        inner = self.dims[query].union(*(self.dims[s] for s in timed if s not in values))
        # The value's own dims pass through to the result; those of scores do not have them.
        own = lambda s: (self.dims[s] & self.kept) - inner  # noqa: E731
        value = max((s for s in values if own(s)), key=lambda s: len(own(s)), default=None)
        narrow = None if value is not None else self._of_width_one(query, keyed, values)
        value = value or narrow
        roles = Roles(
            query,
            keyed,
            value,
            [s for s in timed if s is not value and s not in (*keyed, *bonus)],
            [s for s in left if s not in self.reach],
            {s for s in timed if self.reach[s] == "later"},
            self.degree,
            self.post,
            linear_query=self.degree[query] == 1,
            bonus=bonus,
            narrow=narrow is not None,
        )
        near = 2 if values or roles.linear_query else 0
        for given, own_near in self._lacks(roles, bool(values)):
            raise Rejection(given, near if own_near is None else own_near)
        return roles

    def _acts_at_first(self, live_in: LiveIn) -> bool:
        """Whether the first token's result depends on it, as on what a token's own term is multiplied with: rates of a
        decay act on the past alone."""
        changed = self._run(live_in, self.probe.draw(live_in))
        return difference(changed[:1], self.measured.base[:1]) > SAME

    def _of_width_one(self, query: LiveIn, keyed: list[LiveIn], values: list[LiveIn]) -> LiveIn | None:
        """The value of heads of width one (the channels of a selective scan): all of its dims are decayed apart, and
        the result has them from it. A sum of scores has no dims but those of queries and keys."""
        key = min((self.dims[s] for s in keyed), key=len, default=set())  # of the others, one is the decay
        brought = self.kept.difference(self.dims[query], key, *(self.dims[s] for s, _ in self.post))
        return next((s for s in values if brought and brought <= self.dims[s]), None)

    def _lacks(self, roles: Roles, summed: bool) -> Iterator[tuple[GivenReason, int | None]]:
        """What the roles lack, in the order in which a person would ask.

        With each: how near a subgraph is that fails there; None for one that is as near as its roles are.
        """
        value, known = roles.value, (roles.query, *roles.keyed, *(s for s, _ in self.post))
        reaches = {self.reach[s] for s in (*roles.keyed, *roles.scalars, *([] if value is None else [value]))}
        if "none" in reaches:
            yield reasons.IDLE_SOURCE(), 0
        if self.noncausal is not None:
            yield self.noncausal, None
        if "own" in reaches:
            yield reasons.STRAY_SOURCE(), None
        if not roles.linear_query and not summed:
            yield reasons.NOT_LINEAR(), 0
        if not roles.keyed:
            yield reasons.NO_KEY(), 0
        # The result has dims that neither queries nor keys have, and no other live-in brings linearly.
        if value is None and self.kept.difference(*(self.dims[s] for s in known)):
            yield reasons.VALUE_NOT_FOUND(), 2
        if value is not None and self.reach[value] == "window" and self._really_ends(value):
            yield reasons.SLIDING_WINDOW(output=self.measured.length - 1, input=self.measured.middle), None

    def _really_ends(self, value: LiveIn) -> bool:
        """Whether a value's reach ends, and is not only lost to rounding under a strong decay."""
        probe, last = self.probe, self.measured.base[-1]
        # In proportion to the value, however large it is; what is left of it at the end is no less than this.
        x = probe.values[value]
        changed = x + 1e200 * (probe.at_one_time(value, self.measured.middle) - x)
        return float((self._run(value, changed)[-1] - last).abs().amax()) < 1e-9 * float(last.abs().amax())


# What an output may be multiplied with: its name in `POSTS`, a function of the live-in, and whether it divides.
_FACTORS: tuple[tuple[str, Callable[[Tensor], Tensor], bool], ...] = (
    ("times", lambda x: x, False),
    ("over", lambda x: x, True),
    ("times exp", torch.exp, False),
    ("over exp", torch.exp, True),
)


def _size(x: Tensor) -> float:
    return float(x.abs().max())
