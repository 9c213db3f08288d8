"""What becomes of a program: a mixer is converted; a mutated one is proved a mixer after all, or left with a word."""

from __future__ import annotations

from typing import Any

from tests.fuzz.recipes import Recipe


def expect(recipe: Recipe, report: Any) -> str:
    """How the program ended: "converted", or "left" (a mutated one).

    Raises:
        AssertionError: it is a mixer and was left as it is, or nothing is said of it.
    """
    if len(report.converted) >= (recipe.layers if not recipe.mutation else 1):
        return "converted"
    said = [*(declined.reason for declined in report.declined), *(untouched.kind for untouched in report.untouched)]
    assert said, f"it is missed without a word: {report}"
    assert recipe.mutation, f"a mixer is left as it is: {said}"
    return "left"
