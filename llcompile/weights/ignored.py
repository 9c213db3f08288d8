"""The warnings that level weights have no effect."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from torch import nn

from llcompile.errors import LevelWeightsIgnoredWarning
from llcompile.weights.held import held


def warn_ignored(situation: str) -> None:
    """Warns that level weights have no effect, in words that begin with the situation."""
    warnings.warn(
        f"{situation}: they have no effect, the output is the linear model's. Run the model through "
        "torch.compile(model, backend='loglinear'), or remove them with llcompile.revert(model).",
        LevelWeightsIgnoredWarning,
        stacklevel=3,
    )


def warn_other_backend() -> None:
    """Warns that another backend compiles a model with level weights."""
    warn_ignored("this model has level weights, and it is being compiled by another backend")


def runs_levels(backend: Any) -> bool:
    """Whether graphs that this backend compiled run with their level weights (those of convert's run do not)."""
    return getattr(backend, "_llcompile_runs", False) is True


def warn_if_switched_off(owners: Iterable[nn.Module | None]) -> None:
    """Warns when one of the modules has level weights other than 1, which `level_weights="none"` leaves out."""
    found = [(owner, weights) for owner in owners if owner is not None for _, weights in held(owner)]
    named = sorted({type(owner).__name__ for owner, weights in found if not weights.is_identity()})
    if named:
        warn_ignored(
            f"the level weights of {', '.join(named)} are no longer 1, and level_weights='none' switches them off"
        )
