"""Denominators: pairs sums of scores with the mixers that they normalise, and refuses other divisions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice

from llcompile.patterns import reasons
from llcompile.patterns.graph.walk import walk
from llcompile.patterns.structure.classify import Rejection
from llcompile.patterns.structure.found import Findings, Found, NearMiss, values_of
from llcompile.patterns.structure.hypothesis import Hypothesis
from llcompile.patterns.structure.lift import bases_of
from llcompile.patterns.structure.lifted import Lifted, LiveIn, made_of, origin, sample_of
from llcompile.patterns.structure.moves import MOVES, SHAPES
from llcompile.patterns.structure.program import Op, Row, Value

_ROUNDING = 1e-9
_NEAR_BY = 20  # values around a division that are looked at
_Part = tuple[Value, Value | None]  # a projection, and the piece of it that was taken; None for all of it
# What code does to a denominator before it divides.
_INVERSES = {"reciprocal", "rsqrt", "pow", "log", "log1p"}
_BEHIND = 60  # values behind a sum of scores among which it may be a divisor
_AROUND = MOVES | {"detach", "add", "abs", "clamp", "clamp_min", "maximum", "mul"}


def pair_denominators(findings: Findings) -> None:
    """Sums of scores alone are mixers only as the denominators of others, whose level weights they share.

    One whose keys hold the values (the discretised inputs of a selective scan) is a mixer by itself.
    """
    whole = [f for f in findings.found if f.hypothesis.value is not None or _is_whole(f)]
    for found in findings.found:
        if found.hypothesis.value is None and found not in whole:
            for other in whole:
                if _are_same(other.hypothesis, found.hypothesis):
                    findings.denominators.setdefault(id(other), []).append(found)
                    break
    sums = [f for f in findings.found if f.hypothesis.value is None and f not in whole and not _divides(f)]
    findings.found = [f for f in whole if not _is_divided(findings, f)]
    if sums and not whole and not findings.near_misses:
        alone = Rejection(reasons.NO_VALUE(), 2)
        findings.near_misses += [NearMiss(f.output, alone, f.subgraph, analysis=f.analysis) for f in sums]
    written = [f for mixer in findings.found for f in (mixer, *findings.denominators.get(id(mixer), []))]
    inside = {value for f in written for op in f.ops for value in op.outputs}
    outputs = {f.output for f in written}
    findings.near_misses = [
        m
        for m in findings.near_misses
        if m.value not in inside
        and not (m.subgraph is not None and outputs & {v for op in m.subgraph.ops for v in op.outputs})
    ]


def _is_whole(found: Found) -> bool:
    """Whether keys that decay hold values, and nothing is divided by what is read."""
    return found.full and found.hypothesis.decay is not None and not _divides(found)


def _divides(found: Found) -> bool:
    """Whether something may be divided by what is read."""

    def onward(value: Value) -> Iterable[Value]:
        users = (user for user in value.users if not found.analysis.is_projection(user))
        return (made for user in users for made in user.outputs)

    return any(_inverts(user, value) for value in islice(walk([found.output], onward), _BEHIND) for user in value.users)


def _inverts(user: Op, value: Value) -> bool:
    """Whether an operation divides by a value, or makes something of it that stands for a division."""
    return user.name in _INVERSES or (user.name == "div" and value in user.inputs[1:])


def _are_same(one: Hypothesis, other: Hypothesis) -> bool:
    """Whether a mixer has the scores that another sums; a constant decay was read off each by itself."""
    if _scores(one) != _scores(other) or (one.constant is None) != (other.constant is None):
        return False
    if _factors([one.key]) - _factors([other.key]) or not _factors([other.key]) <= _factors(_written(one)):
        return False
    decays = zip(one.constant or (), other.constant or (), strict=False)
    return all(math.isclose(a, b, rel_tol=_ROUNDING, abs_tol=_ROUNDING) for a, b in decays)


def _scores(hypothesis: Hypothesis) -> tuple[object, ...]:
    """What the scores are made of, but for the keys and a constant decay."""
    decay = None if hypothesis.decay is None else origin(hypothesis.decay)
    return origin(hypothesis.query), decay, hypothesis.transform, len(hypothesis.constant or ())


def _written(hypothesis: Hypothesis) -> list[LiveIn]:
    """What a token writes is a product of these."""
    return [hypothesis.key, *(s for s, _ in hypothesis.factors), *([hypothesis.value] if hypothesis.value else [])]


def _factors(live_ins: Sequence[LiveIn]) -> Counter[object]:
    """What is multiplied in live-ins: a key times its gate is both, also where code makes it a live-in."""
    found: Counter[object] = Counter()
    pending = list(live_ins)
    while pending:
        live_in = pending.pop()
        inner = made_of(live_in)
        is_product = live_in.op is not None and live_in.op.name == "mul" and len(inner) > 1
        if is_product or (live_in.op is not None and live_in.op.name in MOVES and isinstance(live_in, Lifted)):
            pending += inner
        else:
            found[origin(live_in)] += 1
    return found


def _is_divided(findings: Findings, found: Found) -> bool:
    """Whether the code divides the result by something else that joins queries and keys: the level weights would not be
    in both. What is made of decays and gates alone is a factor for each token, and stays."""
    moved = walk([found.output], lambda v: (o for user in v.users if user.name in MOVES for o in user.outputs))
    divisors = [d for value in islice(moved, _NEAR_BY) for user in value.users for d in _divisors(user, value)]
    # What the mixer itself divides by; a factor that a loop carries may be one over a sum as well.
    posts = [(v, how) for s, how in found.hypothesis.post for v in values_of(s)]
    divisors += [v for v, how in posts if how == "over"]
    read = [v for v in values_of(found.hypothesis.query) if isinstance(v, Row)]
    divisors += [*read, *(v for v, _ in posts if isinstance(v, Row))]
    divisors += [] if found.tail is None else [v for v in bases_of(found.tail.root) if v is not found.tail.joined]
    if not any(_joins_others(findings, found, divisor) for divisor in divisors):
        return False
    rejection = Rejection(reasons.OTHER_DENOMINATOR(), 3)
    findings.near_misses.append(NearMiss(found.output, rejection, found.subgraph, analysis=found.analysis))
    return True


def _divisors(user: Op, value: Value) -> list[Value]:
    """What an operation divides the value by."""
    if user.name == "div":
        return [v for v in user.inputs[1:] if user.inputs[0] is value]
    if user.name != "mul":
        return []
    others = [v.op for v in user.inputs if v is not value and v.op is not None]
    return [v for op in others if op.name == "reciprocal" for v in op.inputs]


def _meets(found: Found, value: Value) -> bool:
    """Whether a value that joins positions is made of the queries, keys or values: not of decays and gates alone."""
    hypothesis = found.hypothesis
    given = [s for s in (hypothesis.query, hypothesis.key, hypothesis.value) if s is not None]
    own = _made_from([one for s in given for one in _without_gates(s)], found)
    other = _made_from([value], found)
    return any(a == b or (a[:1] == b[:1] and None in (a[1], b[1])) for a in own for b in other)


def _without_gates(live_in: LiveIn) -> list[LiveIn]:
    """What is multiplied in a live-in, but for what it is multiplied with as a whole: keys times a gate are keys."""
    inner = made_of(live_in)
    if live_in.op is None or live_in.op.name != "mul" or len(inner) < 2:
        return [live_in]
    size = lambda s: math.prod(sample_of(s).shape)  # noqa: E731
    return [one for s in inner if size(s) == max(map(size, inner)) for one in _without_gates(s)]


def _made_from(live_ins: Sequence[LiveIn], found: Found) -> set[_Part]:
    """The projections that live-ins are computed from, each with the piece of it that was taken; None for all of it."""
    is_end = lambda v: v.op is None or found.analysis.is_projection(v.op)  # noqa: E731

    def above(part: _Part) -> Iterable[_Part]:
        value, piece = part
        if value.op is None or is_end(value):
            return ()
        name = value.op.name
        piece = (piece or (None if name in MOVES else value)) if name in SHAPES else None
        return ((v, piece) for v in value.op.inputs)

    start: list[_Part] = [(v, None) for s in live_ins for v in values_of(s)]
    return {(value, piece) for value, piece in walk(start, above) if is_end(value) and value.data is None}


def _joins_others(findings: Findings, found: Found, divisor: Value) -> bool:
    """Whether a denominator joins positions in another way than the mixer's own does."""
    sums = {f.output: f for f in findings.found if f.hypothesis.value is None}
    own = findings.denominators.get(id(found), [])

    def is_mixed(value: Value) -> bool:
        return isinstance(value, Row) or (value in found.analysis.facts and found.analysis.facts[value].mixed)

    def above(value: Value) -> Iterable[Value]:
        plain = value.op is not None and value.op.name in _AROUND
        return value.op.inputs if value.op and plain and value not in sums and not is_mixed(value) else ()

    def is_other(value: Value) -> bool:
        return sums[value] not in own if value in sums else is_mixed(value) and _meets(found, value)

    return any(map(is_other, islice(walk([divisor], above), _NEAR_BY)))
