"""Mixers that stay as they are: what a conversion has measured about them, and what a check leaves out for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import astuple
from typing import Any

from torch import nn

from llcompile.patterns import reasons
from llcompile.patterns.reasons import GivenReason

# Where a module says which of its mixers stay as they are, and why (code, text, hint): it is copied and saved with the
# module, and so has no class of ours in it.
_WITHHELD = "_llcompile_withheld"
# (id of owner, name) of mixers that stay as they are in this thread for the moment.
_withheld_now: ContextVar[frozenset[tuple[int, str]]] = ContextVar("llcompile_withheld", default=frozenset())


def withhold(owner: nn.Module, name: str, given: GivenReason) -> None:
    """Has no later compilation rewrite a mixer: a conversion measured that it must not. `revert` forgets it."""
    vars(owner).setdefault(_WITHHELD, {})[name] = astuple(given)


def withheld(owner: nn.Module, name: str) -> GivenReason | None:
    """Why the mixer whose level weights would be `owner`'s under `name` stays as it is, or None."""
    if (id(owner), name) in _withheld_now.get():
        return reasons.LEFT_OUT()
    stored = vars(owner).get(_WITHHELD, {}).get(name)
    return None if stored is None else GivenReason(*stored)


def forget_withheld(model: nn.Module) -> list[tuple[nn.Module, dict[str, Any]]]:
    """Has the mixers below `model` looked at anew; returns what to hand to `put_withheld` to undo it."""
    return [(m, vars(m).pop(_WITHHELD)) for m in model.modules() if _WITHHELD in vars(m)]


def put_withheld(before: Iterable[tuple[nn.Module, dict[str, Any]]]) -> None:
    """Undoes `forget_withheld`."""
    for owner, held in before:
        vars(owner)[_WITHHELD] = held


@contextmanager
def withholding(mixers: frozenset[tuple[int, str]]) -> Iterator[None]:
    """What is compiled inside, in this thread, leaves these mixers as they are: pairs of an owner's id and a name."""
    token = _withheld_now.set(mixers)
    try:
        yield
    finally:
        _withheld_now.reset(token)
