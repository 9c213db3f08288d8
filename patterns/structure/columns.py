"""Columns: what code takes feature by feature, as the tensor that they are features of (a loop over a key)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from llcompile.patterns.structure.cut import Subgraph
from llcompile.patterns.structure.facts import TimeAnalysis
from llcompile.patterns.structure.follow import WEIGHTED
from llcompile.patterns.structure.lifted import piece
from llcompile.patterns.structure.moves import MOVES, SHAPES
from llcompile.patterns.structure.program import Op, Value

_FEWEST = 4  # features; fewer are queries, keys and values in one tensor
_DEEPEST = 6  # operations between a feature and a live-in of the subgraph


class Column(NamedTuple):
    """One feature: of which tensor, along which dimension, which one; and what is computed from it."""

    base: Value
    dim: int
    place: int
    path: frozenset[Value]


def columns(subgraph: Subgraph, analysis: TimeAnalysis) -> dict[tuple[Value, int], set[Value]]:
    """Tensors that are taken feature by feature, all of them, with the dimension -> what is computed on the way."""
    live_ins = [s for s in subgraph.live_ins if isinstance(s, Value)]
    if len(live_ins) < _FEWEST:
        return {}
    found: dict[tuple[Value, int], dict[int, frozenset[Value]]] = {}
    for live_in in live_ins:
        for base, dim, place, path in _above(live_in, analysis, frozenset()):
            places = found.setdefault((base, dim), {})
            places[place] = places.get(place, frozenset()) | path
    whole = {key: places for key, places in found.items() if len(places) == key[0].shape[key[1]] >= _FEWEST}
    return {key: set().union(*places.values()) for key, places in whole.items()}


def _above(value: Value, analysis: TimeAnalysis, path: frozenset[Value]) -> Iterator[Column]:
    """The features that a value is computed from."""
    op, path = value.op, path | {value}
    if op is None or op.name in WEIGHTED or len(path) > _DEEPEST or analysis.facts[value].form != "sequence":
        return
    if op.name in SHAPES - MOVES and not analysis.mixes_time(op):
        found = _taken(value, op, path)
        if found is not None:
            yield found
            return
    for parent in op.inputs:
        if analysis.facts[parent].data and not analysis.facts[parent].mixed:
            yield from _above(parent, analysis, path)


def _taken(value: Value, op: Op, path: frozenset[Value]) -> Column | None:
    """The one feature that an operation takes; None where it takes several."""
    base, dim, width, start = piece(value, op)
    return None if width > 1 or start is None else Column(base, dim, start, path)
