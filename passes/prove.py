"""Prove: gives each known call its certificate; only what agrees with the operator is rewritten.

One proof serves every call with the same function, constants and set of operands: a model's layers are proved once.
"""

from __future__ import annotations

import time
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
from llcompile.patterns.records import Certificate, Timing

_proofs: dict[Any, Certificate | GivenReason] = {}


def prove(session: Session) -> int:
    """Gives every open candidate its certificate or declines it; returns how many were proved."""
    failed: dict[Any, GivenReason] = {}
    for candidate in session.candidates:
        if candidate.open and isinstance(candidate, CallCandidate):
            with boundary(candidate.where) as outcome:
                _prove(session, candidate, failed)
            if outcome.failed:
                candidate.decline(outcome.given)
    return sum(candidate.open for candidate in session.candidates)


def _prove(session: Session, candidate: CallCandidate, failed: dict[Any, GivenReason]) -> None:
    """`failed` are proofs that did not run in this look: want of memory, say, which need not last."""
    captured, weighted = candidate.captured, session.settings.kind != "none"
    key = (captured.function, behaviour(captured.plain), weighted, _fingerprint(candidate))
    if key not in _proofs and key not in failed:
        start = time.perf_counter()
        try:
            with undisturbed():
                _proofs[key] = torch._dynamo.disable(prove_call)(captured, candidate.call, weighted)
        except DoesNotRun as error:
            failed[key] = reasons.NOT_PROVABLE_HERE(problem=error)
        seconds, function = time.perf_counter() - start, captured.entry.function
        session.timings.append(Timing(f"proof of {function}", seconds, within="prove", what=f"for {candidate.where}"))
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
