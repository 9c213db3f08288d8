"""Running sums over the past: prefix sums and means, running maxima. Nothing weighs one token against another."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from llcompile.patterns.mechanisms.axes import TimeAxes
from llcompile.patterns.mechanisms.facts import Facts
from llcompile.patterns.mechanisms.found import Found
from llcompile.patterns.mechanisms.vocabulary import PROJECTIONS

_KINDS = {"cumsum": "running sum or mean (prefix pooling)", "cummax": "running maximum", "cummin": "running minimum"}
# Counts of tokens are no pooling: positions, places in the queues of experts.
_COUNTS = frozenset({"one_hot", "argmax", "topk", "eq", "ne", "lt", "le", "gt", "ge", "scatter", "ones_like", "arange"})


def find(facts: Facts, axes: TimeAxes) -> Iterator[Found]:
    """Every running sum of features over time."""
    for node in facts.nodes:
        kind = _KINDS.get(facts.names[node], "") if _is_along_time(facts, axes, node) else ""
        below = facts.below(node, lambda n: facts.names[n] in PROJECTIONS) if kind else ()
        if kind and not any(facts.factors(n) for n in below):  # what is summed up meets a query
            yield Found(node, kind, inside=frozenset((node,)))


def _is_along_time(facts: Facts, axes: TimeAxes, node: fx.Node) -> bool:
    """Whether features are summed along time, and are not counts."""
    if facts.names[node] not in _KINDS or node not in facts.activations or not node.args:
        return False
    source, dim = node.args[0], node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if not isinstance(source, fx.Node) or not isinstance(dim, int):
        return False
    example = source.meta.get("example_value")
    if not isinstance(example, torch.Tensor) or not example.is_floating_point():
        return False
    rank = len(facts.shapes.get(source, ()))
    if rank < 3 or (dim if dim < 0 else dim - rank) not in axes.known(source):
        return False
    return not any(facts.names[n] in _COUNTS for n in facts.above(node, lambda n: facts.names[n] in PROJECTIONS, 24))
