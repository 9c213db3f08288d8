"""Properties: the first property of a mixer that a subgraph does not have, measured, in words.

The properties stand in the order in which a person would ask: what sees what, what is summed up, how it is weighed, and
what becomes of a weight with time. Every family has all of them, so the first that fails says why the subgraph is none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llcompile.patterns import reasons
from llcompile.patterns.boundary import NOT_SHOWN, boundary
from llcompile.patterns.reasons import GivenReason
from llcompile.patterns.structure.classify import Rejection
from llcompile.patterns.structure.lifted import LiveIn
from llcompile.patterns.structure.observations import SEEN, Observations

_GONE = 1e-12  # what is left of a weight that was cut off, in proportion to what it was


@dataclass(frozen=True)
class Property:
    """One property that every family has.

    Args:
        failed: the reason for a subgraph that does not have it; None where the subgraph has it, or it cannot be seen.
        near: how near a subgraph is that fails here first.
    """

    failed: Callable[[Observations], GivenReason | None]
    near: int = 3


def explain(measured: Observations, rejection: Rejection) -> tuple[Rejection, bool]:
    """The miss with the first property that fails, and whether there is one.

    A miss that is not near: along this axis, no positions are joined.
    """
    if measured.pointwise:
        return Rejection(rejection.given), True
    for wanted in PROPERTIES:
        given = None
        with boundary(wanted.failed.__name__, *NOT_SHOWN):
            given = wanted.failed(measured)
        if given is not None:
            return Rejection(given, max(rejection.near, wanted.near)), True
    whole = measured.query is not None and measured.value is not None
    return Rejection(rejection.given, max(rejection.near, 3 if whole else 0)), False


def _is_causal(m: Observations) -> GivenReason | None:
    reached = [] if m.value is None else m.reach(m.value, m.length - 1)
    if reached and reached[0] == 0 and _is_linear_in_query(m):  # the values of all later tokens, not of some
        return reasons.BIDIRECTIONAL(output=0, input=m.length - 1)
    for live_in in m.timed:
        for position in (m.middle, m.length - 1):
            ahead = m.looks_ahead(live_in, position)
            if ahead is not None:
                return ahead
    return None


def _is_linear_in_query(m: Observations) -> bool:
    """Whether the result is a sum over what the query is a sum of, or, with a denominator, does not grow with it."""
    if m.query is None:
        return False
    twice = m.run({m.query: 2 * m.probe.values[m.query]})
    return m.is_additive(m.query) or float((twice - m.base).abs().max()) < SEEN * float(m.base.abs().max())


def _keeps_rows_apart(m: Observations) -> GivenReason | None:
    """Batch and heads: what one of them has does not act on another."""
    seen = [a for s in m.timed for a in m.dims(s) if a in m.kept and m.probe.sizing.of(a) > 1]
    for dim in dict.fromkeys(seen):
        holders = [s for s in m.timed if dim in m.dims(s)]
        if len(holders) < 2:
            continue  # a value's own channels may be mixed behind
        first = {s: m.along(s, [dim], 0) > 0 for s in holders}
        changed = {s: torch.where(first[s], m.probe.draw(s), m.probe.values[s]) for s in holders}
        difference = m.probe.run(changed) - m.probe.run()
        position = next(i for i, axis in enumerate(m.probe.result) if dim in axis)
        if len(m.probe.result[position]) > 1:
            continue
        rest = difference.narrow(position, 1, difference.shape[position] - 1)
        if float(rest.abs().max()) > SEEN * float(difference.abs().max()):
            return reasons.ROWS_MIXED()
    return None


def _sums_values(m: Observations) -> GivenReason | None:
    """No input that may be a value is one. Where all that later outputs depend on is contracted, nothing is known."""
    if m.value is not None or not m.summable:
        return None
    return reasons.NOT_LINEAR_IN_VALUE()


def _weighs_a_value_as_one(m: Observations) -> GivenReason | None:
    """All channels of a value have the same weights."""
    value = m.value
    if value is None:
        return None
    own = m.kept.intersection(m.dims(value))
    scored = {a for s in (m.query, *m.keys) if s is not None for a in m.dims(s)}
    others = [s for s in m.timed if s is not value and s not in m.readers and not m.is_paired(s)]
    shared = own.intersection(*(m.dims(s) for s in others)) if others else set()
    if m.query is None or not (own - scored) or (own - scored) - shared:
        return None
    return reasons.VALUE_CHANNELS()


def _looks_forward(m: Observations) -> GivenReason | None:
    """What a token counts depends on it and on what comes after it, not on what came before."""
    if m.value is None or m.length < 5 or m.normalised:
        return None
    others = [s for s in m.timed if s is not m.value]
    before = {s: torch.where(m.other(s, 1) != m.probe.values[s], m.other(s, 1), m.other(s, 0)) for s in others}
    own, changed = m.weights(m.middle), m.weights(m.middle, before)
    if float((own - changed).abs().max()) > SEEN * float(own.abs().max()):
        return reasons.THIRD_POSITION(token=m.middle)
    return None


def _has_a_query(m: Observations) -> GivenReason | None:
    if m.query is not None or not m.paired:
        return None
    return reasons.NO_KEY() if m.readers else reasons.NO_QUERY()


def _has_one_reader(m: Observations) -> GivenReason | None:
    """Beside the query, what acts at one position alone is a factor of the output, or is added to it."""
    if m.query is None or m.value is None:
        return None
    places, last = _places(m), m.length - 1
    for live_in in m.readers:
        if live_in is m.query:
            continue
        own = m.weights_at(places, last)
        other = m.weights_at(places, last, {live_in: m.other(live_in, last)})
        if _off(other, [own]) > SEEN:
            return reasons.DECAY_OF_QUERY()
    return None


def _is_linear_in_the_query(m: Observations) -> GivenReason | None:
    """The weights for a sum of two queries are made of the weights for each; a common factor (a denominator) aside."""
    if m.query is None or m.value is None:
        return None
    places, last, one = _places(m), m.length - 1, m.probe.values[m.query]
    two = m.other(m.query, last)
    apart = [m.weights_at(places, last), m.weights_at(places, last, {m.query: two})]
    together = m.weights_at(places, last, {m.query: one + two})
    return reasons.NOT_LINEAR_IN_QUERY() if _off(together, apart) > SEEN else None


def _is_linear_in_the_key(m: Observations) -> GivenReason | None:
    """A token's own weight, at the first position, where there is no past that a key could act on."""
    if m.query is None or m.value is None or not m.keys or m.normalised:
        return None
    for key in m.keys:
        one, two = m.probe.values[key], m.other(key, 0)
        at = [m.weights(0, {key: x})[0] for x in (one, two, one + two)]
        size = max(float(x.abs().max()) for x in at)
        if size and float((at[0] + at[1] - at[2]).abs().max()) < SEEN * size:
            return None
    own = float(m.weights(0)[0].abs().max())
    return reasons.NOT_LINEAR_IN_KEY() if own > 0 else None


def _sees_all_of_the_past(m: Observations) -> GivenReason | None:
    """No weight falls to nothing from one position to the next."""
    if m.value is None or m.query is None:
        return None
    size = m.weights(0).abs().amax(1)
    for at in range(1, m.length):
        if float(size[at]) <= _GONE * float(size[:at].min()):
            if float(size[at:].max()) > _GONE * float(size[:at].min()):
                return reasons.SKIPPED_TOKENS(output=at, input=0)
            return reasons.SLIDING_WINDOW(output=at, input=0)
    return None


def _decays_step_by_step(m: Observations) -> GivenReason | None:
    """With one and the same key throughout, what lies between two tokens weighs all that came before alike."""
    alone = _one_channel(m)
    if alone is None:
        return None
    weights = [m.weights(s, alone) for s in _early(m)]
    if _is_corrected(m, alone, weights[0]):
        return None
    for s, one in zip(_early(m), weights, strict=True):
        for p, two in zip(_early(m), weights, strict=True):
            if s < p and _off(two[p + 1 :].T, [one[p + 1 :].T]) > SEEN:
                return reasons.DECAY_NOT_A_PRODUCT()
    return None


def _early(m: Observations) -> tuple[int, ...]:
    return (0, 1, m.middle)


def _one_channel(m: Observations) -> dict[LiveIn, Tensor] | None:
    """Queries and keys that are the same at all positions, with one channel only."""
    if m.value is None or m.query is None or not m.keys or m.length < 5:
        return None
    channels = m.contracted(m.query)
    fits = [k for k in m.keys if {*channels} <= {*m.contracted(k)} and m.is_additive(k)]
    return {s: m.along(s, channels, 0) for s in (m.query, *fits)} if fits else None


def _is_corrected(m: Observations, alone: dict[LiveIn, Tensor], own: Tensor) -> bool:
    """Whether what a token counts changes with the keys after it: a delta rule."""
    keys = [s for s in alone if s is not m.query]
    changed = {**alone, **{k: _from(m, k, 1, alone[k], m.probe.draw(k)) for k in keys}}
    other = m.weights(0, changed)
    return float((other - own).abs().max()) > SEEN * float(own.abs().max())


def _from(m: Observations, live_in: LiveIn, position: int, before: Tensor, after: Tensor) -> Tensor:
    """The live-in with one number before a position and another from there on."""
    mask = torch.arange(m.length) >= position
    return torch.where(m.probe.spread(mask, m.probe.sizing.analysis.leaves, live_in), after, before)


def _erases_along_one_key(m: Observations) -> GivenReason | None:
    """What one token makes of the state of the one before is a diagonal plus a matrix of rank one.

    Seen off the diagonal, where two rows and two columns that have no channel in common have a determinant of zero.
    """
    if m.value is None or m.query is None or not m.keys or m.length < 4:
        return None
    channels = m.contracted(m.query)
    if math.prod(m.probe.sizing.of(a) for a in channels) < 4:
        return None
    at = 1 if m.reach(m.value, m.middle)[:1] == [m.middle] else 2  # where the second token's doing is read first
    keys = [k for k in _written(m, at - 1) if {*channels} <= {*m.contracted(k)}]
    if not keys:
        return None
    rows = []
    for j in range(4):
        first = {k: _from(m, k, 1, m.along(k, channels, j), m.probe.values[k]) for k in keys}
        rows.append([m.weights(0, {**first, m.query: m.along(m.query, channels, i)})[at] for i in range(4)])
    minors = [
        (rows[a][c] * rows[b][d], rows[a][d] * rows[b][c]) for a, b, c, d in ((0, 1, 2, 3), (0, 2, 1, 3), (0, 3, 1, 2))
    ]
    off = max(float((one - two).abs().max()) for one, two in minors)
    size = max(float(x.abs().max()) for pair in minors for x in pair)
    return reasons.SEVERAL_ERASE_KEYS() if size > 0 and off > SEEN * size else None


def _written(m: Observations, at: int) -> list[LiveIn]:
    """The keys that a token writes with: the first token's weight depends on them, as nothing is there to erase."""
    own = m.weights(0)[at]
    changed = {k: m.weights(0, {k: m.other(k, 0)})[at] for k in m.keys}
    found = [k for k, other in changed.items() if float((other - own).abs().max()) > SEEN * float(own.abs().max())]
    # k beside beta k: one key, though drawn apart here.
    same = {s for k in found for s in m.origins.get(k, ())} | {*found}
    return [k for k in m.keys if k in same or m.origins.get(k, set()) & same]


def _is_divided_by_its_own_scores(m: Observations) -> GivenReason | None:
    """Where the size of the query does not matter, values of one come out as one."""
    if m.value is None or not m.normalised or m.query is None:
        return None
    ones = torch.ones_like(m.probe.values[m.value])
    large = 1e6 * m.probe.values[m.query]
    nothing = m.run({m.value: torch.zeros_like(ones), m.query: large})
    found = (m.run({m.value: ones, m.query: large}) - nothing).abs()
    return reasons.OTHER_DENOMINATOR() if float((found - 1).abs().max()) > 1e-3 else None


def _places(m: Observations) -> list[int]:
    """Some positions, the first and the last among them."""
    return sorted({0, 1, m.length // 3, m.middle, m.length - 2, m.length - 1})


def _off(target: Tensor, basis: list[Tensor]) -> float:
    """How far rows [N, S] are from sums of the rows of a basis, in proportion."""
    a = torch.stack(basis, dim=-1).double()  # [N, S, basis]
    b = target.double()[..., None]
    scale = a.abs().amax((1, 2), keepdim=True).clamp_min(1e-300)
    a = a / scale
    x = torch.linalg.lstsq(a, b, driver="gelsd").solution
    return float((a @ x - b).abs().max()) / max(float(b.abs().max()), 1e-300)


PROPERTIES: tuple[Property, ...] = (
    # What sees what.
    Property(_is_causal),
    Property(_keeps_rows_apart),
    # What is summed up.
    # Perhaps only something behind a mixer is not linear.
    Property(_sums_values, near=2),
    Property(_weighs_a_value_as_one),
    # How it is weighed.
    Property(_looks_forward),
    Property(_has_a_query),
    Property(_has_one_reader),
    Property(_is_linear_in_the_query),
    Property(_is_linear_in_the_key),
    Property(_is_divided_by_its_own_scores),
    # What becomes of a weight with time.
    Property(_sees_all_of_the_past),
    Property(_decays_step_by_step),
    Property(_erases_along_one_key),
)
