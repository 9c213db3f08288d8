"""Misses: modules that ran in a frame and own level weights that its graph does not read.

They are found by identity: by the marks that their pre-hooks left, by the modules that the graph's nodes were traced
in, and by the call that the frame belongs to.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from torch import nn

from llcompile.errors import LevelWeightsIgnoredWarning, MissedLevelWeightsError
from llcompile.passes import names
from llcompile.passes.session import Session
from llcompile.torch_internals import reach
from llcompile.torch_internals.trace import is_whole_frame
from llcompile.weights.held import held

_NOT_FOUND = "no linear-time mixer of this module was found in the graph"
_WHAT_TO_DO = (
    "Its output would be the linear model's. To see why, call llcompile.inspect(model, *inputs) with the inputs of "
    "this call. llcompile.revert(model) removes the level weights; options={'on_miss': 'warn'} runs the model without "
    "them."
)


def check(session: Session, on_miss: str) -> None:
    """Raises, or warns, where level weights of a module that ran have no part in what was compiled.

    A frame that a graph break has cut may leave the rest to another frame, so there it only ever warns; the forward
    hook of `attachment` says at run time what no frame has read.

    Raises:
        MissedLevelWeightsError: `on_miss="raise"`.
    """
    messages = [_message(session, owner, unread) for owner, unread in misses(session)]
    if not messages:
        return
    if on_miss == "raise" and is_whole_frame():
        raise MissedLevelWeightsError("\n".join([*messages, _WHAT_TO_DO]))
    warnings.warn("\n".join([*messages, _WHAT_TO_DO]), LevelWeightsIgnoredWarning, stacklevel=2)


def misses(session: Session) -> Iterator[tuple[nn.Module, list[str]]]:
    """Each owner whose level weights are not read though it ran, with their names.

    Of several level weights of one owner some may belong to a mixer that does not run in this mode; they are missed if
    their mixer is there and was declined, if the code of their place ran, or if none of the owner's is read.
    """
    read = {(id(s.owner), s.attribute) for s in session.candidates if s.open and s.level_weights is not None}
    declined = {(id(s.owner), s.attribute) for s in session.candidates if not s.open}
    for owner in _ran(session):
        places = {name: weights.place for name, weights in held(owner)}
        unread = [name for name in places if (id(owner), name) not in read]
        if len(unread) < len(places):
            unread = [n for n in unread if (id(owner), n) in declined or names.has_run(session, owner, places[n])]
        if unread:
            yield owner, unread


def _ran(session: Session) -> list[nn.Module]:
    """The modules that ran, from beginning to end, in the frame."""
    found = [reach.find_module(mark.owner) for mark in session.marks]
    for region in session.regions:
        found.extend(reach.modules_in(region.graph))
    if is_whole_frame() and reach.is_call_of_a_module():
        found.append(reach.root_module())
    return list({id(module): module for module in found if module is not None}.values())


def why(session: Session, owner: nn.Module) -> str:
    """Why level weights of a module have no part in a graph: what was said of its mixers, or of what came near."""
    module = _name(session, owner)
    reasons = [f"{s.reason} ({s.where})" for s in session.candidates if s.owner is owner and not s.open]
    records = (*session.near_misses, *session.refused)
    named = bool(module) or owner is reach.root_module()
    reasons = reasons or [f"{r.reason} ({r.where})" for r in records if named and r.module == module]
    return "; ".join(dict.fromkeys(reasons)) or _NOT_FOUND


def mode_name(training: bool) -> str:
    """What PyTorch calls a module's mode."""
    return "training" if training else "eval"


def _name(session: Session, owner: nn.Module) -> str:
    candidates = (candidate.module for candidate in session.candidates if candidate.owner is owner)
    return next(filter(None, candidates), "") or session.settings.names.get(id(owner), "") or reach.path_of(owner)


def _message(session: Session, owner: nn.Module, unread: list[str]) -> str:
    module = _name(session, owner)
    where = f"{type(owner).__name__} {module!r}" if module else type(owner).__name__
    return (
        f"{where} has level weights ({', '.join(unread)}) and ran in this call in {mode_name(owner.training)} mode, "
        f"but the compiled graph does not read them: {why(session, owner)}."
    )
