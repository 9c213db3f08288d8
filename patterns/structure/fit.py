"""Fit: tries the operands that the roles leave open, until the operator agrees with the subgraph."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from llcompile.kernels.choice import portable
from llcompile.patterns import reasons
from llcompile.patterns.agreement import difference
from llcompile.patterns.boundary import NOT_SHOWN, running
from llcompile.patterns.known.lower import apply
from llcompile.patterns.known.operator_call import OperatorCall
from llcompile.patterns.structure.axes import Dim, dims_of
from llcompile.patterns.structure.classify import Rejection, Roles
from llcompile.patterns.structure.early import early_readings
from llcompile.patterns.structure.erase import assignments, erase_scale
from llcompile.patterns.structure.hypothesis import NORMALISERS, Hypothesis, MixerAxes
from llcompile.patterns.structure.lifted import LiveIn
from llcompile.patterns.structure.probe import Probe
from llcompile.patterns.structure.ranges import Range
from llcompile.patterns.structure.sizing import CannotArrange, arrange
from llcompile.patterns.structure.transforms import TRANSFORMS

AGREES = 2e-6  # a guess is taken to the proof where it agrees this well (buffers are float32)
_STEADY = -0.1
_MOST_ERASED = 200  # readings with an erase key that are tried
_DECAY, _RATES, _BETA, _FACTOR, _EXP = "decay", "rates", "beta", "factor", "exponent"


def fit(probe: Probe, roles: Roles, erased: bool = False) -> Hypothesis:
    """The hypothesis of the subgraph that agrees with it on the probe's draw; `erased`: one with an erase key.

    Raises:
        Rejection: none does; with how close the best one came.
    """
    base = probe.outputs()
    closest = math.inf
    plain = itertools.chain(_readings(probe, roles), early_readings(probe, roles, base, _readings))
    for hypothesis in itertools.islice(_erase_readings(probe, roles, base), _MOST_ERASED) if erased else plain:
        try:
            found, error = _fit(probe, hypothesis, roles, base)
        except NOT_SHOWN:
            continue
        if error < AGREES:
            return _with_rest(probe, found, roles)
        closest = min(closest, error)
    if not roles.linear_query:
        raise Rejection(reasons.UNKNOWN_RESULT(), 2, open=True)
    raise Rejection(reasons.NEAR_A_FAMILY(error=closest) if closest < 0.3 else reasons.UNKNOWN_SCORES(), 2, open=True)


def _with_rest(probe: Probe, hypothesis: Hypothesis, roles: Roles) -> Hypothesis:
    """The hypothesis with what the probe left away: the state at the start, and the value once more.

    Raises:
        Rejection: there is something else.
    """
    if roles.first is None and roles.aside is None:
        return hypothesis
    probe.linear_in, none = None, torch.zeros_like
    try:
        if roles.first is not None:
            probe.values[roles.first] = probe.draw(roles.first)
            hypothesis = replace(hypothesis, first=roles.first)
            without = {roles.first: none(probe.values[roles.first])}
            theirs = probe.outputs() - probe.outputs(without)
            ours = output_of(probe, hypothesis) - output_of(probe, hypothesis, without)
            hypothesis = replace(hypothesis, first_scale=_factor(theirs, ours))
        if roles.aside is not None:
            hypothesis = replace(hypothesis, skip=roles.aside)
            without = {roles.query: none(probe.values[roles.query])}
            theirs = probe.outputs(without)
            hypothesis = replace(hypothesis, skip_scale=_factor(theirs, output_of(probe, hypothesis, without)))
    except NOT_SHOWN as error:
        raise Rejection(reasons.ADDED_TO_SUM(), 2, open=True) from error
    return hypothesis


def _factor(theirs: Tensor, ours: Tensor) -> float:
    """What the second is to be multiplied with.

    Raises:
        Rejection: it is not one number.
    """
    factor = float((theirs * ours).sum() / (ours * ours).sum().clamp_min(1e-300))
    if difference(theirs, factor * ours) > AGREES:
        raise Rejection(reasons.ADDED_TO_SUM(), 2, open=True)
    return 1.0 if abs(factor - 1) < 1e-9 else factor


def _readings(probe: Probe, roles: Roles) -> Iterator[Hypothesis]:
    """Every way to read the live-ins, the plainest first."""
    for key in roles.keyed:
        others = [s for s in (*roles.keyed, *roles.scalars, *roles.timeless) if s is not key]
        choices = [_choices(probe, roles, s) for s in others]
        for picked in sorted(itertools.product(*choices), key=lambda p: sum(r in (_DECAY, _BETA) for r in p)):
            if any(picked.count(role) > 1 for role in (_DECAY, _RATES, _BETA)):
                continue
            if _RATES in picked and _DECAY not in picked:
                continue
            named = list(zip(others, picked, strict=True))
            found = _with_transforms(probe, roles, key, named)
            # A decay along the value's channels makes heads of width one, too, but is another mechanism.
            yield from (h for h in found if not roles.narrow or h.family[0] == "channel")


def _erase_readings(probe: Probe, roles: Roles, base: Tensor) -> Iterator[Hypothesis]:
    """Every way to read them with a key of its own along which the state is erased."""
    for one in assignments(probe, roles, base):
        scalars = [s for s in (*one.read, *one.taken, one.decay, one.beta, *one.factors) if s is not None]
        axes = _axes(probe, roles, one.key, scalars)
        factors = tuple((s, "as it is") for s in one.factors)
        found = Hypothesis(
            probe.axes,
            probe.result,
            axes,
            roles.query,
            one.key,
            roles.value,
            factors,
            beta=one.beta,
            post=(*roles.post,),
        )
        found = replace(found, erase_query=one.read, erase_key=one.taken)
        if one.decay is None:
            yield found
            continue
        for transform, late in itertools.product(TRANSFORMS, (False, True)):
            if transform.fits(probe.ranges[one.decay]):
                yield replace(found, decay=one.decay, transform=transform, erase_late=late)


def _choices(probe: Probe, roles: Roles, live_in: LiveIn) -> list[str]:
    if live_in in roles.keyed:
        return [_DECAY]
    found = []
    timeless = live_in in roles.timeless
    if roles.degree[live_in] == 1:
        return [_FACTOR] if not timeless else ["times"]
    if not timeless and live_in not in roles.strict:
        # With a denominator inside, nothing is linear in a factor on the keys.
        found += [_BETA, _EXP] if roles.linear_query else [_FACTOR, _EXP]
    return [*found, _DECAY, _RATES] if timeless and _is_keyed(probe, roles, live_in) else [*found, _DECAY]


def _is_keyed(probe: Probe, roles: Roles, live_in: LiveIn) -> bool:
    """Whether a live-in has the axis that queries and keys meet along."""
    inner = dims_of(probe.axes[roles.query]).difference(probe.rest, probe.sizing.analysis.leaves)
    return not inner.isdisjoint(dims_of(probe.axes[live_in]))


def _with_transforms(probe: Probe, roles: Roles, key: LiveIn, named: list[tuple[LiveIn, str]]) -> Iterator[Hypothesis]:
    one = lambda role: next((s for s, r in named if r == role), None)  # noqa: E731
    decay = one(_DECAY)
    factors = tuple((s, "exp" if r == _EXP else "as it is") for s, r in named if r in (_FACTOR, _EXP))
    post = (*roles.post, *((s, r) for s, r in named if r == "times"))
    inner = (*(f for f, _ in factors), decay, one(_RATES), one(_BETA))
    axes = _axes(probe, roles, key, [s for s in inner if s is not None])
    base = Hypothesis(
        probe.axes, probe.result, axes, roles.query, key, roles.value, factors, beta=one(_BETA), post=post
    )
    bases = [base]
    if base.beta is None and roles.degree[key] != 1 and roles.linear_query:
        bases.append(replace(base, step=1.0))
    for one_base in bases:
        if decay is None:
            yield one_base
            continue
        if one(_RATES) is not None:
            yield from _with_rates(probe, roles, replace(one_base, decay=decay, rates=one(_RATES)))
            continue
        for transform in TRANSFORMS:
            if transform.fits(probe.ranges[decay]):
                found = replace(one_base, decay=decay, transform=transform, shifted=decay in roles.strict)
                yield found
                if decay not in roles.timeless and decay not in roles.strict:
                    yield replace(found, complement=True)
        rate = _rate(probe, one_base, decay)
        if rate is not None:
            yield replace(one_base, decay=decay, transform=TRANSFORMS[0], rate=rate, shifted=decay in roles.strict)


def _with_rates(probe: Probe, roles: Roles, hypothesis: Hypothesis) -> Iterator[Hypothesis]:
    """A log decay that is a token's step times the rate of a channel, either of which may be held with either sign."""
    decay, rates = hypothesis.decay, hypothesis.rates
    assert decay is not None
    assert rates is not None
    signed = _is_of_one_sign(probe.ranges[rates]) and _is_of_one_sign(probe.ranges[decay])
    if decay in roles.keyed or decay in roles.timeless or not signed:
        return
    for transform in TRANSFORMS:
        if transform.name in ("log decay", "rate") and transform.fits(probe.ranges[decay]):
            found = replace(hypothesis, transform=transform, shifted=decay in roles.strict)
            yield found
            yield replace(found, stepped=True)


def _is_of_one_sign(bounds: Range) -> bool:
    return bounds[0] >= -1e-6 or bounds[1] <= 1e-6


def _rate(probe: Probe, hypothesis: Hypothesis, decay: LiveIn) -> float | None:
    """The factor between a live-in and the log decay, where code multiplies after summing; from a constant decay."""
    try:
        with probe.changed({decay: torch.full_like(probe.values[decay], _STEADY)}):
            base = probe.outputs()
            steady = _constant_decay(probe, hypothesis, output_of(probe, hypothesis), base)
    except NOT_SHOWN:
        return None
    if steady is None or steady.constant is None:
        return None
    rates = [number / _STEADY for number in steady.constant]
    return sum(rates) / len(rates) if max(rates) - min(rates) < 1e-6 * max(rates) else None


def _axes(probe: Probe, roles: Roles, key: LiveIn, scalars: list[LiveIn]) -> MixerAxes:
    """The operator's axes, from whose dims are whose."""
    analysis, result = probe.sizing.analysis, probe.rest
    dims = lambda s: dims_of(probe.axes[s])  # noqa: E731
    contracted = (a for axis in probe.axes[roles.query] for a in axis if a not in result and not analysis.is_time(a))
    scored = dims(roles.query) | dims(key)
    inner = scored.union(*map(dims, scalars))
    own = dims(roles.value) - inner if roles.value is not None else set()
    rest = [a for a in result if a not in own]
    batch = _batch(rest)
    heads = [a for a in rest if a not in batch]
    return MixerAxes(
        batch=tuple(batch),
        time=analysis.leaves,
        groups=tuple(a for a in heads if a in scored),
        rest=tuple(a for a in heads if a not in scored),
        key=tuple(contracted),
        value=tuple(a for a in result if a in own),
    )


def _batch(dims: list[Dim]) -> list[Dim]:
    """Those of the axes that no parameter has; without parameters, the first."""
    free = [a for a in dims if not a.weight]
    if len(free) == len(dims):
        return free[:1]
    return free


def _fit(probe: Probe, hypothesis: Hypothesis, roles: Roles, base: Tensor) -> tuple[Hypothesis, float]:
    """The hypothesis with its numbers (scale, constant decay, epsilon) found, and how far it is from the subgraph."""
    if not roles.linear_query:
        return _fit_normaliser(probe, hypothesis, base)
    if hypothesis.erase_query:
        hypothesis = _with_erase_scale(probe, hypothesis, base)
    if hypothesis.own is not None:
        return _fit_beside_own(probe, hypothesis, base)
    ours = output_of(probe, hypothesis)
    found, error = _scaled(hypothesis, ours, base)
    if error >= AGREES and hypothesis.step is not None:
        step = _constant_step(probe, hypothesis, base)
        if step is not None:
            stepped = replace(hypothesis, step=step)
            found, error = _scaled(stepped, output_of(probe, stepped), base)
    if error >= AGREES and hypothesis.decay is None and not hypothesis.erase_query:
        for headed in (hypothesis, *_more_heads(hypothesis)):
            decayed = _constant_decay(probe, headed, ours, base)
            if decayed is not None:
                # Over two tokens anything dies away as a decay does: only the agreement says whose it is.
                found, error = min(
                    (found, error), _scaled(decayed, output_of(probe, decayed), base), key=lambda f: f[1]
                )
            if error < AGREES:
                break
    return found, error


def _with_erase_scale(probe: Probe, hypothesis: Hypothesis, base: Tensor) -> Hypothesis:
    """The hypothesis with the factor on what is erased.

    Raises:
        CannotArrange: there is none.
    """
    assert hypothesis.value is not None
    changed = {hypothesis.value: probe.at_one_time(hypothesis.value, 0)}
    theirs = (base - probe.outputs(changed))[1]
    tried = [replace(hypothesis, erase_scale=factor) for factor in (0.0, 1.0)]
    none, whole = ((output_of(probe, h) - output_of(probe, h, changed))[1] for h in tried)
    factor = erase_scale((none, whole), theirs)
    if factor is None:
        raise CannotArrange
    return replace(hypothesis, erase_scale=factor)


def _fit_beside_own(probe: Probe, hypothesis: Hypothesis, base: Tensor) -> tuple[Hypothesis, float]:
    """The hypothesis with its scale, where the token's own weight is known."""
    own = output_of(probe, hypothesis.scaled(0.0))
    ours, theirs = output_of(probe, hypothesis) - own, base - own
    found, error = _scaled(hypothesis, ours, theirs)
    if error >= AGREES and hypothesis.decay is None:
        decayed = _constant_decay(probe, hypothesis, ours, theirs)
        if decayed is not None:
            ours = output_of(probe, decayed) - own
            found, error = min((found, error), _scaled(decayed, ours, theirs), key=lambda f: f[1])
    return found, error


def _more_heads(hypothesis: Hypothesis) -> Iterator[Hypothesis]:
    """The hypothesis with an axis of the value as heads: only a decay of the code's own numbers may tell them apart."""
    axes = hypothesis.axes
    for dim in axes.value if len(axes.value) > 1 else ():
        others = tuple(a for a in axes.value if a is not dim)
        yield replace(hypothesis, axes=replace(axes, rest=(*axes.rest, dim), value=others))


def output_of(probe: Probe, hypothesis: Hypothesis, changed: Mapping[LiveIn, Tensor] | None = None) -> Tensor:
    """What the hypothesis computes on the probe's draw, with some live-ins changed, as [T, everything else]."""
    return _finished(probe, hypothesis, _mixed(probe, hypothesis, changed), changed)


def _mixed(probe: Probe, hypothesis: Hypothesis, changed: Mapping[LiveIn, Tensor] | None = None) -> Tensor:
    """What the operator computes, [B, T, H, V]; with a denominator as the last channel where there is one."""
    mixer = hypothesis.mixer({**probe.values, **(changed or {})}, probe.sizing.of, probe.dtype)
    # Operands that fit no call of the operator are another hypothesis'.
    with portable(), running(probe.subgraph.result):
        output: Tensor = apply(mixer, None, OperatorCall())[0]
    return output


def _finished(
    probe: Probe, hypothesis: Hypothesis, output: Tensor, changed: Mapping[LiveIn, Tensor] | None = None
) -> Tensor:
    """What the hypothesis makes of the operator's output, as [T, everything else]."""
    return probe.by_time(hypothesis.finish(output, {**probe.values, **(changed or {})}, probe.sizing.of))


def _scaled(hypothesis: Hypothesis, ours: Tensor, base: Tensor) -> tuple[Hypothesis, float]:
    scale = float((ours * base).sum() / (ours * ours).sum().clamp_min(1e-300))
    return hypothesis.scaled(hypothesis.scale * scale), difference(base, ours * scale)


def _constant_decay(probe: Probe, hypothesis: Hypothesis, ours: Tensor, base: Tensor) -> Hypothesis | None:
    """The decay that the code holds as numbers, from how an impulse at the start dies away."""
    value = hypothesis.value if hypothesis.value is not None else hypothesis.key
    start = {value: probe.at_one_time(value, 0)}
    theirs, own = base - probe.outputs(start), ours - output_of(probe, hypothesis, start)
    if hypothesis.early:  # what the first token reads is none of its own
        theirs, own = theirs[1:], own[1:]
    heads = _by_head(probe, hypothesis, theirs), _by_head(probe, hypothesis, own)
    ratio = (heads[0] * heads[1]).sum(-1) / (heads[1] * heads[1]).sum(-1).clamp_min(1e-300)  # [T, H]
    ratio = ratio / ratio[:1]
    if not bool((ratio > 0).all()) or ratio.shape[0] < 2:
        return None
    # From the last position at which the impulse is still strong: the further, the more exact.
    strong = int((ratio.amin(1) > 1e-3).nonzero().flatten()[-1])
    if strong == 0:
        return None
    log_decay = torch.log(ratio[strong]) / strong  # [H]
    expected = torch.exp(log_decay * torch.arange(strong + 1)[:, None])
    if float(((ratio[: strong + 1] - expected) / expected).abs().max()) > 1e-4:
        return None
    if bool((log_decay > 1e-9).any()) or float(log_decay.abs().max()) < 1e-9:
        return None
    return replace(hypothesis, constant=tuple(float(x) for x in log_decay))


def _constant_step(probe: Probe, hypothesis: Hypothesis, base: Tensor) -> float | None:
    """The beta that the code holds as a number, from what the second token leaves of the first.

    Up to a factor that is (1 - beta) times what no correction leaves, and beta times what a step of one leaves.
    """
    if hypothesis.value is None or probe.length < 2:
        return None
    changed = {hypothesis.value: probe.at_one_time(hypothesis.value, 0)}
    theirs = (base - probe.outputs(changed))[1]
    tried = [replace(hypothesis, step=step) for step in (None, 1.0)]
    left = [(output_of(probe, h) - output_of(probe, h, changed))[1] for h in tried]
    without, whole = torch.linalg.lstsq(torch.stack(left, 1).double(), theirs.double()[:, None]).solution[:, 0].tolist()
    step = whole / (without + whole) if without + whole else math.nan
    return step if math.isfinite(step) and step > 0 else None


def _by_head(probe: Probe, hypothesis: Hypothesis, x: Tensor) -> Tensor:
    """A result [T, N] as [T, H, N / H]."""
    time, heads = probe.sizing.analysis.leaves, hypothesis.axes.heads
    others = tuple(a for a in probe.rest if a not in heads)
    return arrange(x, (time, probe.rest), (time, heads, others), probe.sizing.of)


_Ours = Callable[[tuple[str, float] | None, float], Tensor]


def _fit_normaliser(probe: Probe, hypothesis: Hypothesis, base: Tensor) -> tuple[Hypothesis, float]:
    """The denominator inside: the operator on ones, and what the code does to it."""
    mixed = _mixed(probe, replace(hypothesis, normaliser=("d + e", 0.0)))

    def ours(normaliser: tuple[str, float] | None, factor: float) -> Tensor:
        """With this denominator, for queries times a factor: sum and denominator are linear in them."""
        output = factor * (mixed if normaliser else mixed[..., :-1])
        found = replace(hypothesis, normaliser=normaliser)
        return _finished(probe, found, output, _queries_times(probe, hypothesis, factor))

    best: tuple[Hypothesis, float] = (hypothesis, math.inf)
    epsilon = _epsilon(probe, hypothesis, ours)
    for form in NORMALISERS:
        normaliser = form, _slope(ours, base) if form == "d + e s" else epsilon
        error = difference(base, ours(normaliser, 1.0))
        # Queries of the other sign, where there are such: |d| is not d. Where the denominator is about as large as the
        # epsilon, a sum and a maximum differ.
        for factor in (_turned(probe, hypothesis), epsilon):
            if factor and error < AGREES:
                theirs = probe.outputs(_queries_times(probe, hypothesis, factor))
                error = max(error, difference(theirs, ours(normaliser, factor)))
        best = min(best, (replace(hypothesis, normaliser=normaliser), error), key=lambda pair: pair[1])
    return best


def _turned(probe: Probe, hypothesis: Hypothesis) -> float:
    """What queries may be multiplied with for the other sign; 0 for queries that have one sign only."""
    low, query = probe.ranges[hypothesis.query][0], probe.values[hypothesis.query]
    return 0.0 if low >= 0 else -min(1.0, 0.9 * abs(low) / float(query.abs().max()))


def _epsilon(probe: Probe, hypothesis: Hypothesis, ours: _Ours) -> float:
    """What remains of the denominator when the queries are tiny."""
    theirs = probe.outputs(_queries_times(probe, hypothesis, 1e-30))
    numerator = ours(None, 1e-30)
    epsilon = float((numerator * numerator).sum() / (numerator * theirs).sum())
    return epsilon if math.isfinite(epsilon) and epsilon > 1e-25 else 0.0


def _slope(ours: _Ours, base: Tensor) -> float:
    """What is added to the sum of the keys, from how far the denominator is off: n / base = d + e s."""
    plain = ours(("d + e", 0.0), 1.0)  # n / d
    large = 1e30
    only = large * ours(("d + e s", large), 1.0)  # n / s
    slope = float((only / base - only / plain).median())
    return slope if math.isfinite(slope) and slope > 1e-12 else 0.0


def _queries_times(probe: Probe, hypothesis: Hypothesis, factor: float) -> dict[LiveIn, Tensor]:
    return {hypothesis.query: probe.values[hypothesis.query] * factor}
