"""Attach: finds or makes the level weights of each proved mixer, and the tensor that they are computed from."""

from __future__ import annotations

from llcompile.errors import LevelWeightsError
from llcompile.passes.origin import projection_input
from llcompile.passes.session import Session, Site


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
    if weights.heads != shape.heads or (weights.in_features is not None and weights.in_features != width):
        raise LevelWeightsError(
            f"{site.module}.{site.attribute} was made for {weights.heads} heads and an input of width "
            f"{weights.in_features}, but the mixer at {site.where} has {shape.heads} heads and an input of width "
            f"{width}. Call llcompile.revert(model) and convert it again."
        )
    site.level_weights = weights
