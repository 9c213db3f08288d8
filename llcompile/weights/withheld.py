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
from llcompile.weights.held import held

# Where a module says which of its mixers stay as they are, and why (code, text, hint): it is copied and saved with the
# module, and so has no class of ours in it.
_WITHHELD = "_llcompile_withheld"
_ALL = ""  # in the place of a name
# (id of owner, name) of mixers that stay as they are in this thread for the moment.
_withheld_now: ContextVar[frozenset[tuple[int, str]]] = ContextVar("llcompile_withheld", default=frozenset())


def withhold(owner: nn.Module, name: str, given: GivenReason) -> None:
    """Has no later compilation rewrite a mixer: a conversion measured that it must not. `revert` forgets it."""
    vars(owner).setdefault(_WITHHELD, {})[name] = astuple(given)


def withhold_all(owner: nn.Module, given: GivenReason) -> None:
    """Has no later compilation attach level weights to a module in which a conversion declined all that it found:
    a shorter or a longer call may look like a mixer, and its level weights would be missed in the others."""
    if not any(held(owner)):
        withhold(owner, _ALL, given)


def withheld(owner: nn.Module, name: str) -> GivenReason | None:
    """Why the mixer whose level weights would be `owner`'s under `name` stays as it is, or None."""
    if (id(owner), name) in _withheld_now.get():
        return reasons.LEFT_OUT()
    stored = vars(owner).get(_WITHHELD, {})
    given = stored.get(name, None if any(held(owner)) else stored.get(_ALL))
    return None if given is None else GivenReason(*given)


def forget_withheld(model: nn.Module) -> list[tuple[nn.Module, dict[str, Any]]]:
    """Has the mixers below `model` looked at anew; returns what to hand to `put_withheld` to undo it."""
    return [(m, vars(m).pop(_WITHHELD)) for m in model.modules() if _WITHHELD in vars(m)]


def put_withheld(before: Iterable[tuple[nn.Module, dict[str, Any]]]) -> None:
    """Undoes `forget_withheld`."""
    for owner, kept in before:
        vars(owner)[_WITHHELD] = kept


@contextmanager
def withholding(mixers: frozenset[tuple[int, str]]) -> Iterator[None]:
    """What is compiled inside, in this thread, leaves these mixers as they are: pairs of an owner's id and a name."""
    token = _withheld_now.set(mixers)
    try:
        yield
    finally:
        _withheld_now.reset(token)
