"""Rewrite: writes the operator into the graph in the place of each proved mixer; a declined call runs its own code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from llcompile.passes.candidate import CallCandidate, Candidate, GraphCandidate
from llcompile.passes.emit import take_owner_input
from llcompile.passes.one_token import TokenCandidate
from llcompile.passes.rewrite_call import restore, write_call
from llcompile.passes.rewrite_part import write_part
from llcompile.passes.rewrite_token import write_token
from llcompile.passes.session import Session

_Writer = Callable[[Session, Any, dict[tuple[int, str], fx.Node]], None]
_WRITERS: dict[type[Candidate], _Writer] = {
    CallCandidate: write_call,
    GraphCandidate: write_part,
    TokenCandidate: write_token,
}


def rewrite(session: Session) -> int:
    """Writes every open candidate, and takes back every captured call that is not; returns how many were written."""
    inputs: dict[tuple[int, str], fx.Node] = {}
    for candidate in session.candidates:
        if candidate.open:
            take_owner_input(session, candidate)
            _WRITERS[type(candidate)](session, candidate, inputs)
        elif isinstance(candidate, CallCandidate):
            restore(candidate)
    return sum(candidate.open for candidate in session.candidates)
