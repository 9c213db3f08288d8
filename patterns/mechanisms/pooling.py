"""Running sums over the past: prefix sums and means, running maxima. Nothing weighs one token against another."""

from __future__ import annotations

from collections.abc import Iterator

from llcompile.patterns.mechanisms.facts import Facts, node_of
from llcompile.patterns.mechanisms.found import Found
from llcompile.patterns.structure.program import Value

RUNNING = {"cumsum": "running sum or mean (prefix pooling)", "cummax": "running maximum", "cummin": "running minimum"}
# Counts of tokens are no pooling: positions, places in the queues of experts.
COUNTS = frozenset({"argmax", "topk", "eq", "ne", "lt", "le", "gt", "ge", "scatter", "arange"})


def find(facts: Facts) -> Iterator[Found]:
    """Every running sum of features over time."""
    for value in facts.values:
        kind = RUNNING.get(facts.names[value], "") if value in facts.activations else ""
        below = facts.below(value, facts.is_projection)
        if kind and _is_along_time(facts, value) and not any(map(facts.factors, below)):  # else it meets a query
            yield Found(node_of(value), kind, frozenset((value,)))


def _is_along_time(facts: Facts, value: Value) -> bool:
    """Whether features are summed along time, and are not counts."""
    assert value.op is not None
    summed, dim = value.op.inputs[0], value.op.args[1] if len(value.op.args) > 1 else value.op.kwargs["dim"]
    if not summed.dtype.is_floating_point or len(summed.shape) < 3 or value.index or not facts.times.along(summed, dim):
        return False
    return not any(facts.names[v] in COUNTS for v in facts.above(value, facts.is_projection, 24))
