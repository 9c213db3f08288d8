"""Denominators: pairs sums of scores with the mixers that they normalise, and refuses other divisions."""

from __future__ import annotations

import math
from collections.abc import Sequence

from llcompile.patterns import reasons
from llcompile.patterns.structure.classify import Rejection
from llcompile.patterns.structure.found import Findings, Found, NearMiss, values_of
from llcompile.patterns.structure.hypothesis import Hypothesis
from llcompile.patterns.structure.lifted import MOVES, SHAPES, LiveIn, origin
from llcompile.patterns.structure.program import Op, Value

_ROUNDING = 1e-9
# What code does to a denominator before it divides.
_AROUND = MOVES | {"detach", "add", "abs", "clamp", "clamp_min", "maximum", "mul"}


def pair_denominators(findings: Findings) -> None:
    """Sums of scores alone are mixers only as the denominators of others, whose level weights they share."""
    whole = [f for f in findings.found if f.hypothesis.value is not None]
    for found in findings.found:
        if found.hypothesis.value is None:
            for other in whole:
                if _are_same(other.hypothesis, found.hypothesis):
                    findings.denominators.setdefault(id(other), []).append(found)
                    break
    findings.found = [f for f in whole if not _is_divided(findings, f)]
    inside = {value for f in findings.found for op in f.ops for value in op.outputs}
    outputs = {f.output for mixer in findings.found for f in (mixer, *findings.denominators.get(id(mixer), []))}
    findings.near_misses = [
        m
        for m in findings.near_misses
        if m.value not in inside
        and not (m.subgraph is not None and outputs & {v for op in m.subgraph.ops for v in op.outputs})
    ]


def _are_same(one: Hypothesis, other: Hypothesis) -> bool:
    """Whether two hypotheses have the same scores; a constant decay was read off each by itself."""
    if _scores(one) != _scores(other) or (one.constant is None) != (other.constant is None):
        return False
    decays = zip(one.constant or (), other.constant or (), strict=False)
    return all(math.isclose(a, b, rel_tol=_ROUNDING, abs_tol=_ROUNDING) for a, b in decays)


def _scores(hypothesis: Hypothesis) -> tuple[object, ...]:
    """What the scores are made of, but for a constant decay."""
    decay = None if hypothesis.decay is None else origin(hypothesis.decay)
    return origin(hypothesis.query), origin(hypothesis.key), decay, hypothesis.transform, len(hypothesis.constant or ())


def _is_divided(findings: Findings, found: Found) -> bool:
    """Whether the code divides the result by something else that joins queries and keys: the level weights would not be
    in both. What is made of decays and gates alone is a factor for each token, and stays."""
    pending, seen = [found.output], 0
    while pending and seen < 20:
        value = pending.pop()
        seen += 1
        for user in value.users:
            if user.name in MOVES:
                pending.extend(user.outputs)
            elif any(_joins_others(findings, found, d) for d in _divisors(user, value)):
                rejection = Rejection(reasons.OTHER_DENOMINATOR(), 3)
                findings.near_misses.append(NearMiss(found.output, rejection, found.subgraph, analysis=found.analysis))
                return True
    return False


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
    own = _made_from([s for s in (hypothesis.query, hypothesis.key, hypothesis.value) if s is not None], found)
    other = _made_from([value], found)
    return any(a == b or (a[:1] == b[:1] and None in (a[1], b[1])) for a in own for b in other)


def _made_from(live_ins: Sequence[LiveIn], found: Found) -> set[tuple[Value, Value | None]]:
    """The projections that live-ins are computed from, each with the piece of it that was taken; None for all of it."""
    made: set[tuple[Value, Value | None]] = set()
    pending: list[tuple[Value, Value | None]] = [(v, None) for s in live_ins for v in values_of(s)]
    seen = set(pending)
    while pending:
        value, piece = pending.pop()
        op = value.op
        if op is None or found.analysis.is_projection(op):
            made.update([(value, piece)] if value.data is None else [])
            continue
        piece = (piece or (None if op.name in MOVES else value)) if op.name in SHAPES else None
        new = [(v, piece) for v in op.inputs if (v, piece) not in seen]
        seen.update(new)
        pending.extend(new)
    return made


def _joins_others(findings: Findings, found: Found, divisor: Value) -> bool:
    """Whether a denominator joins positions in another way than the mixer's own does."""
    sums = {f.output: f for f in findings.found if f.hypothesis.value is None}
    own = findings.denominators.get(id(found), [])
    pending, seen = [divisor], 0
    while pending and seen < 20:
        value = pending.pop()
        seen += 1
        if value in sums:
            if not any(sums[value] is f for f in own):
                return True
            continue
        fact = found.analysis.facts.get(value)
        if fact is not None and fact.mixed:
            if _meets(found, value):
                return True
            continue
        if value.op is not None and value.op.name in _AROUND:
            pending.extend(value.op.inputs)
    return False
