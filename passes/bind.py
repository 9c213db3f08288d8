"""Bind: reads each captured call's arguments as the operands of a Mixer, or says what does not fit."""

from __future__ import annotations

import torch

from llcompile.errors import MixerError
from llcompile.passes.session import Session
from llcompile.passes.site import CallSite
from llcompile.patterns import reasons
from llcompile.patterns.boundary import boundary
from llcompile.patterns.known.arguments import Mismatch, read_call
from llcompile.patterns.mixer import validate
from llcompile.torch_internals.inputs import fake_mode_of


def bind(session: Session) -> int:
    """Gives every site its call, mixer and sizes; returns how many were bound."""
    for site in session.sites:
        if isinstance(site, CallSite):
            with boundary(site.where) as outcome:
                _bind(site)
            if outcome.failed:
                site.decline(outcome.given)
    return sum(site.open for site in session.sites)


def _bind(site: CallSite) -> None:
    row, leaf = site.leaf.row, site.leaf
    if leaf.problem is not None:
        return site.decline(leaf.problem)
    try:
        site.bound = read_call(row, leaf.plain, site.arguments)
    except Mismatch as mismatch:
        return site.decline(mismatch.given)
    try:
        with fake_mode_of(site.node.graph), torch.no_grad():
            mixer = row.bind(site.call)
            site.cell, site.shape = (mixer.decay, mixer.correction), validate(mixer)
    except MixerError as error:
        return site.decline(reasons.OPERANDS_UNFIT(problem=error))
    return None
