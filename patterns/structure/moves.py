"""Moves: operations that keep numbers as they are, by what they do with their places. The one table of them."""

from __future__ import annotations


def names(*texts: str) -> frozenset[str]:
    """Words as a set."""
    return frozenset(name for text in texts for name in text.split())


# The same numbers in the same order; axes of size one come and go.
VIEWS = names("view _unsafe_view reshape unsqueeze squeeze")
# The same numbers in another order.
TURNS = names("permute transpose t")
# All numbers as they are.
MOVES = VIEWS | TURNS | names("expand clone contiguous _to_copy alias")
# One position, and pieces of several.
PICKS = names("select unbind")
CUTS = PICKS | names("slice split split_with_sizes")
# All numbers, or some of them.
SHAPES = MOVES | CUTS
# Pieces written into a whole.
WRITES = names("select_scatter slice_scatter index_put")
