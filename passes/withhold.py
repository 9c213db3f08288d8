"""Withhold: leaves the mixers as they are that a conversion's own run has shown to be better left alone."""

from __future__ import annotations

from llcompile.passes.session import Session


def withhold(session: Session) -> int:
    """Declines the sites that the front door withholds; returns how many."""
    count = 0
    for site in session.sites:
        given = None if site.owner is None else session.settings.withheld(site.owner, site.attribute)
        if site.open and given is not None:
            site.decline(given)
            count += 1
    return count
