"""The key of a proof follows what a function does: itself, its helpers, and their constants."""

from __future__ import annotations

import types
from typing import Any

import pytest

from llcompile.patterns.known.behaviour import behaviour

TEXT = """
LIMIT = 1.0
def helper(x):
    return x + LIMIT
def inner(x, shift=2):
    return helper(x) * shift
def function(x):
    return inner(x)
def aside(x):
    return x
"""


def _library() -> types.ModuleType:
    module = types.ModuleType("library")
    exec(TEXT, vars(module))
    return module


CHANGES: dict[str, Any] = {
    "a helper's helper": lambda m: setattr(m, "helper", lambda x: x),
    "a constant": lambda m: setattr(m, "LIMIT", 2.0),
    "a default": lambda m: setattr(m.inner, "__defaults__", (3,)),
    "code in place": lambda m: setattr(m.helper, "__code__", (lambda x: x).__code__),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_what_is_used_changes_the_key(change: str) -> None:
    library = _library()
    before = behaviour(library.function)
    CHANGES[change](library)
    assert behaviour(library.function) != before


def test_control_what_is_not_used_does_not() -> None:
    library = _library()
    before = behaviour(library.function)
    library.aside = library.OTHER = None  # type: ignore[attr-defined]
    assert behaviour(library.function) == before
    assert hash(behaviour(library.function)) == hash(before)
