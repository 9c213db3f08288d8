"""Prove: gives each known call its certificate; only what agrees with the operator is rewritten.

One proof serves every call with the same function, constants and set of operands: a model's layers are proved once.
"""

from __future__ import annotations

from typing import Any

import torch

from llcompile.passes.candidate import CallCandidate
from llcompile.passes.session import Session
from llcompile.patterns import reasons
from llcompile.patterns.agreement import undisturbed
from llcompile.patterns.boundary import boundary
from llcompile.patterns.known.arguments import is_level_state
from llcompile.patterns.known.behaviour import behaviour
from llcompile.patterns.known.draws import small_sizes
from llcompile.patterns.known.proof import DoesNotRun, prove_call
from llcompile.patterns.reasons import GivenReason
from llcompile.patterns.records import Certificate

_proofs: dict[Any, Certificate | GivenReason] = {}


def prove(session: Session) -> int:
    """Gives every open candidate its certificate or declines it; returns how many were proved."""
    failed: dict[Any, GivenReason] = {}
    for candidate in session.candidates:
        if candidate.open and isinstance(candidate, CallCandidate):
            with boundary(candidate.where) as outcome:
                _prove(candidate, session.settings.kind != "none", failed)
            if outcome.failed:
                candidate.decline(outcome.given)
    return sum(candidate.open for candidate in session.candidates)


def _prove(candidate: CallCandidate, weighted: bool, failed: dict[Any, GivenReason]) -> None:
    """`failed` are proofs that did not run in this look: want of memory, say, which need not last."""
    captured = candidate.captured
    key = (captured.function, behaviour(captured.plain), weighted, _fingerprint(candidate))
    if key not in _proofs and key not in failed:
        try:
            with undisturbed():
                _proofs[key] = torch._dynamo.disable(prove_call)(captured, candidate.call, weighted)
        except DoesNotRun as error:
            failed[key] = reasons.NOT_PROVABLE_HERE(problem=error)
    result = _proofs[key] if key in _proofs else failed[key]
    if isinstance(result, Certificate):
        candidate.certificate = result
    else:
        candidate.decline(result)


def _fingerprint(candidate: CallCandidate) -> Any:
    """What a proof depends on: constants, which operands are given, the kind of state, and the small sizes."""
    facts = []
    for name, value in sorted(candidate.call.values.items()):
        if name in candidate.captured.entry.packing:
            continue
        facts.append(
            (name, "state" if is_level_state(value) else "tensor" if isinstance(value, torch.Tensor) else repr(value))
        )
    return tuple(facts), tuple(sorted(small_sizes(candidate.call.sizes).items()))
