"""Near misses: which of them are said, and in which order."""

from __future__ import annotations

from collections.abc import Collection

from llcompile.patterns import reasons
from llcompile.patterns.structure.axes import Axis
from llcompile.patterns.structure.classify import Rejection
from llcompile.patterns.structure.found import Findings, NearMiss
from llcompile.torch_internals.places import module_of

# Properties of weights: where they fail with random numbers in place of a mask or a decay, the real ones may have them.
_BY_NUMBERS = frozenset(
    [
        "not-causal",
        "bidirectional",
        "sliding-window",
        "skipped-tokens",
        "decay-not-a-product",
        "decay-out-of-range",
        "other-denominator",
        "unknown-scores",
        "not-run",
    ]
)


def explain_near_misses(findings: Findings, given: Collection[Axis]) -> None:
    """Says of each near miss which property failed, the nearest first; what is inside of a nearer one goes."""
    for missed in findings.near_misses:
        missed.rejection = missed.rejection if missed.why is None else missed.why()
        lost = missed.lost() if missed.rejection.given.code in _BY_NUMBERS else None
        if lost is not None:
            missed.rejection = Rejection(reasons.NO_VALUES(shape=list(lost.shape)), missed.rejection.near)
    near = [m for m in findings.near_misses if m.rejection.near]
    first = next((m.axis for m in near if m.axis in given), ())
    # The batch, taken as time, is not causal.
    near = [m for m in near if m.axis not in given or m.axis == first]
    # Of two that are as near, the later one: the whole of what the other is a piece of; without what comes behind it.
    latest = [m for m in reversed(near) if not _only_follows(m, near)]
    kept: list[NearMiss] = []
    for missed in sorted(latest, key=lambda m: -m.rejection.near):
        if not any(missed.is_inside(m) or m.is_inside(missed) or _are_one(missed, m) for m in kept):
            kept.append(missed)
    findings.near_misses = sorted(kept, key=lambda m: -1 if m.value.op is None else m.value.op.number)


def _only_follows(missed: NearMiss, near: list[NearMiss]) -> bool:
    """Whether it does no more, token by token, than to go on from one that is as near, or to join several that have
    nothing in common."""
    inner = [m for m in near if m.value.op is not missed.value.op and m.is_inside(missed)]
    inner = [m for m in inner if m.rejection.near >= missed.rejection.near]
    if not inner or missed.is_more_than(inner):
        return False
    whole = [m for m in inner if not any(m.is_inside(other) for other in inner if other is not m)]
    apart = sum(len(m.origins) for m in whole) == len({origin for m in whole for origin in m.origins})
    return apart or any(not missed.is_more_than([m]) for m in inner)


def _are_one(missed: NearMiss, nearer: NearMiss) -> bool:
    """Whether two near misses belong to one mechanism: the same module computes them from the same."""
    together = module_of(missed.anchor.meta) == module_of(nearer.anchor.meta)
    return together and not missed.origins.isdisjoint(nearer.origins)
