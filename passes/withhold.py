"""Withhold: leaves the mixers as they are that a conversion's own run has shown to be better left alone."""

from __future__ import annotations

from llcompile.passes.session import Session


def withhold(session: Session) -> int:
    """Declines the candidates that the front door withholds; returns how many."""
    count = 0
    for candidate in session.candidates:
        given = None if candidate.owner is None else session.settings.withheld(candidate.owner, candidate.attribute)
        if candidate.open and given is not None:
            candidate.decline(given)
            count += 1
    return count
