"""What joins positions and has no name of its own: named where nothing else is said of a module."""

from __future__ import annotations

from collections.abc import Iterator

from llcompile.patterns.mechanisms.facts import Facts, node_of
from llcompile.patterns.mechanisms.found import Found
from llcompile.patterns.mechanisms.pooling import COUNTS, RUNNING
from llcompile.patterns.mechanisms.vocabulary import PRODUCTS
from llcompile.patterns.structure.program import Value

_KIND = "unnamed time mixing"


def find(facts: Facts) -> Iterator[Found]:
    """Every product that is summed over positions, and every running sum that meets a query."""
    for value in facts.values:
        if value in facts.activations and _joins(facts, value) and not _counts(facts, value):
            yield Found(node_of(value), _KIND, frozenset((value,)))


def _joins(facts: Facts, value: Value) -> bool:
    if value.op is None or not value.dtype.is_floating_point:
        return False
    return (facts.names[value] in RUNNING or facts.names[value] in PRODUCTS) and facts.times.mixes(value.op)


def _counts(facts: Facts, value: Value) -> bool:
    """Whether tokens are counted or sent to experts rather than weighed."""
    return any(facts.names[v] in COUNTS for v in facts.above(value, facts.is_projection, 24))
