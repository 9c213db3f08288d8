"""What a first compiled call changes by itself, as warnings: level weights that nobody had attached, adopted states."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from llcompile.errors import LateAttachWarning, StateAdoptedWarning
from llcompile.passes.candidate import Candidate
from llcompile.passes.session import Session


def warn_attached(session: Session) -> None:
    """Warns that optimizers do not know the level weights that the session has attached, if it has."""
    new = {(id(owner), name) for owner, name in session.attached}
    if new:
        modules = _modules(s for s in session.candidates if (id(s.owner), s.attribute) in new)
        warnings.warn(
            f"level weights were attached to {len(new)} mixers ({_few(modules)}) at the first compiled call: an "
            "optimizer built earlier does not include them. Call llcompile.convert(model, *example_inputs) before you "
            "build the optimizer.",
            LateAttachWarning,
            stacklevel=2,
        )


def warn_adopted(candidates: Iterable[Candidate]) -> None:
    """Warns that the states of these mixers, if any, have been taken up as one level each."""
    modules = _modules(candidates)
    if modules:
        warnings.warn(
            f"the states of {len(modules)} mixers ({_few(modules)}) come from the unconverted model. Each was imported "
            "as a single level, the last one, and positions count from here. To have levels for the past, prefill "
            "again through the compiled model.",
            StateAdoptedWarning,
            stacklevel=2,
        )


def _modules(candidates: Iterable[Candidate]) -> list[str]:
    """The names of the candidates' modules, each once."""
    return list(dict.fromkeys(candidate.module for candidate in candidates))


def _few(modules: list[str]) -> str:
    return ", ".join(modules[:3]) + ", ..." * (len(modules) > 3)
