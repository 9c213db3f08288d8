"""Early: ways to read live-ins as a mixer whose queries read the state before their own token changes it.

A token then does not see itself, or sees itself with a weight of its own (the bonus of RWKV-6), which is found at the
first token, where nothing else is seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from torch import Tensor

from llcompile.patterns.agreement import difference
from llcompile.patterns.boundary import NOT_SHOWN
from llcompile.patterns.structure.classify import Roles
from llcompile.patterns.structure.hypothesis import Hypothesis
from llcompile.patterns.structure.lifted import LiveIn
from llcompile.patterns.structure.probe import Probe

_NOTHING = 1e-11  # of the largest output
_AGREES = 1e-6
Readings = Callable[[Probe, Roles], Iterator[Hypothesis]]


def early_readings(probe: Probe, roles: Roles, base: Tensor, readings: Readings) -> Iterator[Hypothesis]:
    """The readings with early reads that the output of the first token allows.

    Args:
        probe: the subgraph.
        roles: of its live-ins.
        base: its result, [T, ...].
        readings: the readings of other mixers.
    """
    blind = float(base[0].abs().max()) <= _NOTHING * float(base.abs().max())
    if not blind and not roles.linear_query:
        return
    for bonus in [()] if blind else [(), *((s,) for s in roles.bonus)]:
        # All acts on later tokens only: that alone does not say what a live-in is.
        others = replace(roles, strict=set(), timeless=[s for s in roles.timeless if s not in bonus])
        if any(s not in others.timeless and s not in bonus for s in roles.bonus):
            continue
        for plain in readings(probe, others):
            early = replace(plain, early=True, shifted=False)
            found = early if blind else _with_own(probe, early, bonus, base)
            if found is not None:
                yield from (replace(found, decayed=decayed) for decayed in _whether_decayed(roles, plain.decay))


def _whether_decayed(roles: Roles, decay: LiveIn | None) -> tuple[bool, ...]:
    """Whether the decay acts before the state is read; both where all tokens have the same one."""
    if decay is None or decay in roles.timeless:
        return False, True
    return (decay not in roles.strict,)


def _with_own(probe: Probe, hypothesis: Hypothesis, bonus: tuple[LiveIn, ...], base: Tensor) -> Hypothesis | None:
    """The hypothesis with the weight of the own token; None where it is not made of these live-ins."""
    if hypothesis.value is None:
        return None
    for own in ((hypothesis.key, *bonus), bonus) if bonus else ((hypothesis.key,),):
        found = replace(hypothesis, own=own, own_scale=1.0)
        try:
            term = found.own_term(probe.values, probe.sizing.of)
            ours = probe.by_time(found.laid_out(term, probe.sizing.of))[0]
        except NOT_SHOWN:
            continue
        theirs = base[0]
        factor = float((theirs * ours).sum() / (ours * ours).sum().clamp_min(1e-300))
        if difference(theirs[None], factor * ours[None]) < _AGREES:
            return replace(found, own_scale=factor)
    return None
