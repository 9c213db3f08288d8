"""Habits of real code around a mixer, and twins: where time comes from, what is done to operands, how loops are cut.

A file for each kind of habit; `layer.py` has the plain layer around which they are shown.
"""

# ruff: noqa: F401  (each file fills the two tables)

from tests.spellings.habits import (
    affine,
    born,
    captured,
    chunk_cuts,
    constants,
    discretised,
    divided_loops,
    divisors,
    equal_sizes,
    features,
    key_features,
    made_anew,
    mixed_operands,
    normalisers,
    positions,
    sharing,
)
