"""One token: a hand-written mixer in a graph of a single token, where nothing shows which axis is time.

The first token sees itself alone: all of its output is of level 0, so that it is the linear one times the weight of
that level. What is remembered of a mixer when it is recognised among several tokens is where in the user's code its
output and its operands are computed, and what the axes of the output are. In a graph of one token the same places are
looked up, and the output is proved to be linear in the values, without a rest: no state has come in, and nothing that
is not weighed was added.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from llcompile.passes.candidate import Candidate, GraphCandidate
from llcompile.passes.session import Session
from llcompile.passes.spots import Call, Spot, Spots, stack_of
from llcompile.patterns import reasons
from llcompile.patterns.agreement import BUDGETS
from llcompile.patterns.boundary import boundary
from llcompile.patterns.graph.regions import Region
from llcompile.patterns.mixer import MixerShape
from llcompile.patterns.records import Certificate
from llcompile.patterns.structure.axes import Axis, Dim, dims_of
from llcompile.patterns.structure.found import Found
from llcompile.patterns.structure.linearity import off_linear
from llcompile.torch_internals import reach
from llcompile.torch_internals.places import place_of, user_line
from llcompile.torch_internals.sizes import size_hint


@dataclass(frozen=True)
class RememberedPart:
    """One recognised part (the mixer, or a denominator of it).

    Args:
        output: where its result is computed.
        axes: the axes of that, with dims of their own.
        batch, time, heads: the dims of these axes.
        values: where the operand that it is linear in is computed, or one of those that it is made of.
    """

    output: Spot
    axes: tuple[Axis, ...]
    batch: Axis
    time: Axis
    heads: Axis
    values: tuple[Spot, ...]


@dataclass(frozen=True)
class Remembered:
    """What is remembered of a mixer.

    Args:
        parts: the denominators and the mixer.
        operands: where the operands are computed.
        cell, shape: its family, and its sizes.
    """

    parts: tuple[RememberedPart, ...]
    operands: tuple[Spot, ...]
    cell: Any
    shape: MixerShape


@dataclass(eq=False)
class TokenPart:
    """A part that was found again: its output, sizes of dims that differ, and nodes of the values."""

    place: RememberedPart
    output: fx.Node
    sizes: dict[int, int]
    values: list[fx.Node]


@dataclass
class TokenCandidate(Candidate):
    """A mixer of one token, which was found at its place.

    Args:
        parts: the denominators and the mixer.
        operands: the nodes of its operands.
    """

    parts: list[TokenPart] = field(kw_only=True)
    operands: list[fx.Node] = field(kw_only=True)

    @property
    def rows_and_tokens(self) -> tuple[int, int]:
        """How many rows and tokens it has."""
        part = self.parts[-1]
        return math.prod(part.sizes[id(dim)] for dim in part.place.batch), 1

    def activations(self) -> list[fx.Node]:
        """The nodes of its operands that depend on the model's input."""
        return self.operands

    def values(self) -> list[fx.Node]:
        """As `Candidate.values`."""
        return self.parts[-1].values

    def batch_first(self, node: fx.Node) -> tuple[int, int] | None:
        """As `Candidate.batch_first`."""
        value = node.meta.get("example_value")
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return None
        batch, shape = self.rows_and_tokens[0], [size_hint(size) for size in value.shape]
        if len(shape) == 2 and shape[0] == batch == 1:
            return -1, 0
        if len(shape) != 3:
            return None
        return (0, 1) if shape[:2] == [batch, 1] else (1, 0) if shape[:2] == [1, batch] else None


def remember(candidate: GraphCandidate) -> Remembered | None:
    """Where a mixer that was recognised among several tokens would be found with one; None where that is not known."""
    if len(candidate.found.hypothesis.axes.batch) > 1 or not all(map(_is_plain, candidate.group)):
        return None
    spots = Spots(candidate.region.graph, candidate.owner)
    try:
        parts = tuple(_part_place(spots, found) for found in candidate.group)
        operands = tuple(spots.of(node, before=candidate.found.anchor) for node in candidate.found.activations())
    except LookupError:
        return None
    return Remembered(parts, operands, candidate.cell, MixerShape(*candidate.found.sizes))


def _part_place(spots: Spots, found: Found) -> RememberedPart:
    dims: dict[int, Dim] = {}
    copied = lambda axis: tuple(dims.setdefault(id(a), Dim(a.size)) for a in axis)  # noqa: E731
    hypothesis = found.hypothesis
    axes, result = hypothesis.axes, hypothesis.result
    if not {*axes.batch, *axes.heads} <= dims_of(result):
        raise LookupError("its output has not all axes of its weights")
    if {*axes.time} != dims_of(axis for axis in result if {*axis} <= {*axes.time}):
        raise LookupError("its output has no axis of time alone, which would show that there is one token")
    stack = stack_of(found.anchor)
    return RememberedPart(
        spots.of(found.anchor, stack[-1] if stack else None),
        tuple(copied(axis) for axis in result),
        copied(axes.batch),
        copied(axes.time),
        copied(axes.heads),
        tuple(spots.of(node, before=found.anchor) for node in found.nodes_of(hypothesis.value or hypothesis.key)),
    )


def one_token(session: Session) -> int:
    """Adds a candidate for each remembered mixer of a module that ran with one token; returns how many."""
    if session.settings.dry_run:  # a look shows what was recognised
        return 0
    before = len(session.candidates)
    seen = {(id(candidate.owner), candidate.attribute) for candidate in session.candidates}
    for region, owner, key in _calls(session):
        places = {name: weights.token for name, weights in session.settings.held(owner)}
        places = {name: place for name, place in places.items() if place and (id(owner), name) not in seen}
        spots = Spots(region.graph, owner)
        for name, place in places.items():
            with boundary(f"{type(owner).__name__} with one token"):
                found = _find(spots, key, place)
                if found is not None:
                    session.candidates.append(_candidate(session, region, (owner, name), place, *found))
    return len(session.candidates) - before


def _candidate(
    session: Session,
    region: Region,
    weights: tuple[nn.Module, str],
    place: Remembered,
    parts: list[TokenPart],
    operands: list[fx.Node],
) -> TokenCandidate:
    node = parts[-1].output
    module = session.name(*place_of(node))
    candidate = TokenCandidate(node, region, module, user_line(node.meta), *weights, parts=parts, operands=operands)
    candidate.cell, candidate.shape = place.cell, place.shape
    error = off_linear(region, ((part.values, part.output) for part in parts), operands)
    candidate.certificate = Certificate(error, "float64", 2)
    if not error <= BUDGETS["float64"]:
        candidate.decline(reasons.ONE_TOKEN_NOT_LINEAR())
    if not all(_stands_alone(region, part.output) for part in parts):
        candidate.decline(reasons.ONE_TOKEN_CHANGED())
    return candidate


def _stands_alone(region: Region, output: fx.Node) -> bool:
    """Whether another tensor can be read, and written to, in an output's place: nothing else shows its memory then."""
    effects, nodes = region.effects, list(region.graph.nodes)
    shown, at = effects.shows(output), nodes.index(output)
    if not effects.is_written(output):
        return not effects.outlives(shown)
    before, behind = nodes[:at], set(nodes[at + 1 :])
    seen = (node for node in before if not behind.isdisjoint(node.users))
    built = any(not shown.isdisjoint(effects.writes(node)) for node in nodes[: at + 1])
    return not (effects.outlives(shown) or built or any(not shown.isdisjoint(effects.shows(node)) for node in seen))


def _calls(session: Session) -> Iterator[tuple[Region, nn.Module, Call | None]]:
    """The calls of modules that hold level weights; None for the one that the frame is."""
    root = [None] if reach.is_call_of_a_module() else []
    for region in session.regions:
        for call in dict.fromkeys((*root, *(call for node in region.graph.nodes for call in stack_of(node)))):
            owner = reach.root_module() if call is None else reach.find_module(call[0])
            if owner is not None and not region.closed and session.settings.held(owner):
                yield region, owner, call


def _is_plain(found: Found) -> bool:
    """Whether all that it gives is weighed, and nothing that is not: a normaliser inside has an epsilon, say."""
    hypothesis = found.hypothesis
    added = (
        hypothesis.first is not None
        or hypothesis.skip is not None
        or hypothesis.early
        or any(how == "plus" for _, how in hypothesis.post)
    )
    plain = found.tail is None and hypothesis.normaliser is None and not added
    return plain and found.order == found.analysis.leaves


def _find(spots: Spots, call: Call | None, place: Remembered) -> tuple[list[TokenPart], list[fx.Node]] | None:
    """The parts and operands of the mixer at its place, with one token; None where it is not there, or has more."""
    parts = []
    try:
        output = spots.at(place.parts[-1].output, call)
        operands = [spots.at(spot, before=output) for spot in place.operands]
        for part in place.parts:
            node = spots.at(part.output, call)
            values = [spots.at(spot, before=node) for spot in part.values]
            sizes = _sizes(part, node)
            if sizes is None:
                return None
            parts.append(TokenPart(part, node, sizes, values))
    except LookupError:
        return None
    return parts, operands


def _sizes(place: RememberedPart, node: fx.Node) -> dict[int, int] | None:
    """The size of each dim in a tensor of one token; None where the tensor's shape is another one."""
    value = node.meta.get("example_value")
    if not isinstance(value, torch.Tensor) or value.dim() != len(place.axes):
        return None
    sizes: dict[int, int] = {}
    for axis, size in zip(place.axes, (size_hint(n) for n in value.shape), strict=True):
        sizes.update((id(dim), dim.size) for dim in axis)
        sizes.update((id(dim), 1) for dim in axis if dim in place.time)
        free = next((dim for dim in axis if dim in place.batch), None)
        others = math.prod(sizes[id(dim)] for dim in axis if dim is not free)
        if size is None or size % others or (free is None and size != others):
            return None
        if free is not None:
            sizes[id(free)] = size // others
    return sizes
