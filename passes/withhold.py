"""Withhold: leaves the mixers as they are that a conversion's own run has shown to be better left alone."""

from __future__ import annotations

from llcompile.passes.session import Session

_HINT = "call llcompile.revert(model) to try again with the next convert"


def withhold(session: Session) -> int:
    """Declines the sites that the front door withholds; returns how many."""
    count = 0
    for site in session.sites:
        reason = session.settings.withheld(site.owner, site.attribute) if site.open and site.owner is not None else ""
        if reason:
            site.decline(reason, _HINT)
            count += 1
    return count
