"""Attach: finds or makes the level weights of each proved mixer, and the tensor that they are computed from."""

from __future__ import annotations

from typing import Any

from llcompile.errors import LevelWeightsError
from llcompile.passes.origin import projection_input
from llcompile.passes.session import Session, Site

# The options that say what level weights are like, by what they are about.
_OPTIONS = {"kind": "level_weights", "levels": "levels"}


def attach(session: Session) -> int:
    """Gives every open site its level weights; returns how many were newly attached."""
    if session.settings.kind == "none":
        return 0
    for site in session.sites:
        if site.open and site.owner_missing:
            site.decline(
                "its module cannot be reached from the compiled frame, so it has no place for level weights",
                "a graph break above this line splits the module's forward; TORCH_LOGS=graph_breaks shows it",
            )
        if site.open and site.owner is not None:
            _attach(session, site)
    return len(session.attached)


def _expect_path(session: Session, site: Site) -> None:
    """No hook of the owner has handed its level weights in, so they must be where Dynamo can read them."""
    assert site.owner is not None
    try:
        session.settings.path(site.owner, site.attribute)
    except LookupError as error:
        site.decline(f"its level weights cannot be read in this frame: {error}", "compile the model as a whole")


def _attach(session: Session, site: Site) -> None:
    settings, owner, shape = session.settings, site.owner, site.shape
    assert owner is not None
    assert shape is not None
    site.source = projection_input(site)
    width = None if site.source is None else int(site.source.meta["example_value"].shape[-1])
    weights = settings.find(owner, site.attribute)
    if weights is None:
        weights = settings.make(settings.kind if width else "static", shape.heads, settings.levels, width, owner)
        if not settings.dry_run:
            settings.attach(owner, site.attribute, weights)
            session.attached.append((owner, site.attribute))
    elif session.settings.compiles and not session.marks:
        _expect_path(session, site)
    if weights.heads != shape.heads or (weights.in_features is not None and weights.in_features != width):
        raise LevelWeightsError(
            f"{site.module}.{site.attribute} was made for {weights.heads} heads and an input of width "
            f"{weights.in_features}, but the mixer at {site.where} has {shape.heads} heads and an input of width "
            f"{width}. Call llcompile.revert(model) and convert it again."
        )
    _check_asked(session, site, weights)
    site.level_weights = weights


def _check_asked(session: Session, site: Site, weights: Any) -> None:
    """What was asked for must not contradict level weights that are there; "static" is what an absent input gives."""
    asked = {name: value for name, value in session.settings.asked.items() if getattr(weights, name) != value}
    if site.source is None and weights.kind == "static":
        asked.pop("kind", None)
    if asked:
        said = " and ".join(f"{_OPTIONS[name]}={value!r}" for name, value in asked.items())
        raise LevelWeightsError(
            f"options ask for {said}, but {site.module or 'the model'}.{site.attribute} has level weights already, of "
            f"kind {weights.kind!r} with {weights.levels} levels. Leave the option out to use them; or call "
            "llcompile.revert(model), which deletes them with what they have learned, and convert the model again."
        )
