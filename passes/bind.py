"""Bind: reads each captured call's arguments as the operands of a Mixer, or says what does not fit."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from llcompile.errors import MixerError
from llcompile.passes import dynamo
from llcompile.passes.session import Session, Site
from llcompile.patterns.known.arguments import Mismatch, is_level_state, read_call, state_argument
from llcompile.patterns.mixer import validate

_STALE_STATE = "its state was made by a model without level weights, so the levels of the past are not known"


def bind(session: Session) -> int:
    """Gives every site its call, mixer and sizes; returns how many were bound."""
    for site in session.sites:
        if site.leaf is not None:
            _bind(site, session.settings.kind)
    return sum(site.open for site in session.sites)


def example_arguments(node: fx.Node) -> dict[str, Any]:
    """The call's arguments as Dynamo knows them: fake tensors and constants."""
    return fx.map_arg(dict(node.kwargs), lambda n: n.meta["example_value"])  # type: ignore[return-value]


def _bind(site: Site, kind: str) -> None:
    row, leaf = site.known.row, site.known
    if leaf.problem is not None:
        return site.decline(leaf.problem, "the installed version is not one that the table knows; please report it")
    given = example_arguments(site.node)
    try:
        site.call = read_call(row, leaf.plain, given)
    except Mismatch as mismatch:
        return site.decline(str(mismatch), "the call runs the library's own code")
    try:
        with dynamo.fake_mode_of(site.node.graph), torch.no_grad():
            mixer = row.bind(site.call)
            site.cell, site.shape = (mixer.decay, mixer.correction), validate(mixer)
    except MixerError as error:
        return site.decline(str(error), "the call runs the library's own code")
    state = site.call[state_argument(row)]
    if state is not None and is_level_state(state) != (kind != "none"):
        hint = "prefill again through the compiled model, or compile with level_weights='none'"
        site.decline(_STALE_STATE if kind != "none" else "its state has levels, and level weights are off", hint)
    return None
