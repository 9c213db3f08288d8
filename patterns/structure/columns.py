"""Columns: what code takes feature by feature, as the tensor that they are features of (a loop over a key)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from llcompile.patterns.structure.cut import Part
from llcompile.patterns.structure.facts import Times
from llcompile.patterns.structure.follow import WEIGHTED
from llcompile.patterns.structure.lifted import MOVES, SHAPES, piece
from llcompile.patterns.structure.program import Op, Value

_FEWEST = 4  # features; fewer are queries, keys and values in one tensor
_DEEPEST = 6  # operations between a feature and a source of the part


class Column(NamedTuple):
    """One feature: of which tensor, along which dimension, which one; and what is computed from it."""

    base: Value
    dim: int
    place: int
    path: frozenset[Value]


def columns(part: Part, times: Times) -> dict[tuple[Value, int], set[Value]]:
    """Tensors that are taken feature by feature, all of them, with the dimension -> what is computed on the way."""
    sources = [s for s in part.sources if isinstance(s, Value)]
    if len(sources) < _FEWEST:
        return {}
    found: dict[tuple[Value, int], dict[int, frozenset[Value]]] = {}
    for source in sources:
        for base, dim, place, path in _above(source, times, frozenset()):
            places = found.setdefault((base, dim), {})
            places[place] = places.get(place, frozenset()) | path
    whole = {key: places for key, places in found.items() if len(places) == key[0].shape[key[1]] >= _FEWEST}
    return {key: set().union(*places.values()) for key, places in whole.items()}


def _above(value: Value, times: Times, path: frozenset[Value]) -> Iterator[Column]:
    """The features that a value is computed from."""
    op, path = value.op, path | {value}
    if op is None or op.name in WEIGHTED or len(path) > _DEEPEST or times.facts[value].form != "sequence":
        return
    if op.name in SHAPES - MOVES and not times.mixes_time(op):
        found = _taken(value, op, path)
        if found is not None:
            yield found
            return
    for parent in op.inputs:
        if times.facts[parent].data and not times.facts[parent].mixed:
            yield from _above(parent, times, path)


def _taken(value: Value, op: Op, path: frozenset[Value]) -> Column | None:
    """The one feature that an operation takes; None where it takes several."""
    base, dim, width, start = piece(value, op)
    return None if width > 1 or start is None else Column(base, dim, start, path)
