"""Bind: reads each captured call's arguments as the operands of a Mixer, or says what does not fit."""

from __future__ import annotations

import torch

from llcompile.errors import MixerError
from llcompile.passes.candidate import CallCandidate
from llcompile.passes.session import Session
from llcompile.patterns import reasons
from llcompile.patterns.boundary import boundary
from llcompile.patterns.known.arguments import CallRejection, read_call
from llcompile.patterns.mixer import validate
from llcompile.torch_internals.inputs import fake_mode_of


def bind(session: Session) -> int:
    """Gives every candidate its call, mixer and sizes; returns how many were bound."""
    for candidate in session.candidates:
        if isinstance(candidate, CallCandidate):
            with boundary(candidate.where) as outcome:
                _bind(candidate)
            if outcome.failed:
                candidate.decline(outcome.given)
    return sum(candidate.open for candidate in session.candidates)


def _bind(candidate: CallCandidate) -> None:
    entry, captured = candidate.captured.entry, candidate.captured
    if captured.problem is not None:
        return candidate.decline(captured.problem)
    try:
        candidate.bound = read_call(entry, captured.plain, candidate.arguments)
    except CallRejection as rejection:
        return candidate.decline(rejection.given)
    try:
        with fake_mode_of(candidate.node.graph), torch.no_grad():
            mixer = entry.bind(candidate.call)
            candidate.cell, candidate.shape = (mixer.decay, mixer.correction), validate(mixer)
    except MixerError as error:
        return candidate.decline(reasons.OPERANDS_UNFIT(problem=error))
    return None
