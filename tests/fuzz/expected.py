"""What becomes of a program that is a mixer: it is converted, or a table says why it may be left, in which words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tests.fuzz.recipes import Recipe


@dataclass(frozen=True)
class Outside:
    """Recipes whose mixer may be left as it is.

    Args:
        where: of some of a recipe's fields, the names that it has there.
        reason: what the report says then (a regular expression).
        because: why.
    """

    where: Mapping[str, tuple[str, ...]]
    reason: str
    because: str

    def has(self, recipe: Recipe) -> bool:
        """Whether a recipe is one of them."""
        return all(getattr(recipe, field) in names for field, names in self.where.items())


OUTSIDE = (
    Outside(
        {"layout": ("BTHD",), "in_place": ("the first value", "a channel of q")},
        "its reach ends|not linear in the (query|value)|not every earlier token|not those of a known family",
        "what `v[:, 0] = 0` leaves is no node of Dynamo's graph unless a view of it is taken afterwards, so that the "
        "part begins before the assignment",
    ),
)


def expect(recipe: Recipe, report: Any) -> str:
    """How the program ended: "converted", "left" (a mutated one), or "outside".

    Raises:
        AssertionError: it is a mixer, and no row of the table says that it may be left.
    """
    if len(report.converted) >= (recipe.layers if not recipe.mutation else 1):
        return "converted"
    if recipe.mutation:
        return "left"
    reasons = [declined.reason for declined in report.declined]
    row = next((row for row in OUTSIDE if row.has(recipe)), None)
    assert row is not None, f"a mixer is left as it is: {reasons}"
    assert reasons, f"a mixer is missed without a word: {report}"
    assert all(re.search(row.reason, reason) for reason in reasons), f"left for another reason than expected: {reasons}"
    return "outside"
