"""Makes a failing program smaller: takes the first, plainest name of a table wherever it still fails then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tests.fuzz.recipes import AROUND, DECAYS, FEATURES, GROUPS, HOOKS, IN_PLACE, LAYOUTS, MODELS, RUNNERS, Recipe

_PLAIN = {
    "hook": HOOKS,
    "model": MODELS,
    "runner": RUNNERS,
    "in_place": IN_PLACE,
    "around": AROUND,
    "feature": FEATURES,
    "group": GROUPS,
    "decay": DECAYS,
    "layout": LAYOUTS,
}


def shrunk(recipe: Recipe, fails: Callable[[Recipe], bool]) -> Recipe:
    """The recipe with as few things out of the ordinary as possible, one after the other.

    Args:
        recipe: one that fails.
        fails: whether another one does; a program that cannot be written does not.
    """
    for field, plain in [("layers", 1), *((field, next(iter(table))) for field, table in _PLAIN.items())]:
        smaller = replace(recipe, **{field: plain})
        if smaller != recipe and fails(smaller):
            recipe = smaller
    return recipe
