"""Candidates: one mixer in one graph, from its discovery to its rewrite, by how it was found."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from llcompile.passes.head_split import HeadSplit
from llcompile.patterns.families import FAMILIES, SELECTIVE_SCAN, Correction, Decay
from llcompile.patterns.graph.regions import Region
from llcompile.patterns.known import Arguments
from llcompile.patterns.known.capture import CapturedFunction
from llcompile.patterns.mixer import MixerShape
from llcompile.patterns.reasons import GivenReason
from llcompile.patterns.records import Certificate
from llcompile.patterns.structure.found import Found
from llcompile.patterns.structure.program import Row


@dataclass
class Candidate:
    """One mixer in the graph: a `CallCandidate`, a `GraphCandidate` or a `TokenCandidate` (passes/one_token.py).

    Args:
        node: the node that gives its result.
        region: the graph that it stands in.
        module: the module's name in the user's model.
        where: the user's line.
        owner: the module that its level weights belong to.
        attribute: their name there.
        place: where it stands in the user's code (see passes/names.py).
        cell, shape: its family and sizes.
        certificate: the outcome of its proof.
        weight_input: what its level weights are computed from.
        owner_input: what the owner was called with, where level weights read that and this graph does not hold it.
        level_weights: the module.
        split: how its heads are split over processes.
        mask: [B, T] in the graph, non-zero at tokens that are no padding (`mask_inverted`: at padding).
        masks: every padding mask above its operands, whether or not it covers them all.
        notes: for the report.
        written: what the rewrite has put in its place.
        given: why it stays as it is.
    """

    node: fx.Node
    region: Region
    module: str
    where: str
    owner: nn.Module | None = None
    attribute: str = "loglinear"
    place: Any = None
    cell: tuple[Decay, Correction] | None = None
    shape: MixerShape | None = None
    certificate: Certificate | None = None
    weight_input: fx.Node | None = None
    owner_input: torch.Tensor | None = None
    level_weights: Any = None
    split: HeadSplit | None = None
    mask: fx.Node | None = None
    masks: frozenset[fx.Node] = frozenset()
    mask_inverted: bool = False
    notes: list[str] = field(default_factory=list)
    written: list[fx.Node] = field(default_factory=list)
    given: GivenReason | None = None

    origin = "graph"  # how the mixer was found: "function" or "graph"

    @property
    def rows_and_tokens(self) -> tuple[Any, Any]:
        """How many rows and tokens it has."""
        raise NotImplementedError

    def activations(self) -> list[fx.Node]:
        """The nodes of its operands that depend on the model's input."""
        raise NotImplementedError

    def values(self) -> list[fx.Node]:
        """The nodes that its values are read from."""
        raise NotImplementedError

    def batch_first(self, node: fx.Node) -> tuple[int, int] | None:
        """The dimensions (batch, time) of a sequence [B, T, D] or [T, B, D] of its rows and tokens; None for others.

        The batch's is -1 where it has none ([T, D]).
        """
        raise NotImplementedError

    @property
    def family(self) -> str:
        """What the field calls it."""
        assert self.cell is not None
        return FAMILIES[self.cell]

    @property
    def open(self) -> bool:
        """Whether nothing has spoken against the rewrite so far."""
        return self.given is None

    @property
    def reason(self) -> str:
        """Why it stays as it is, in a sentence; "" where it is open."""
        return "" if self.given is None else self.given.text

    @property
    def all_notes(self) -> tuple[str, ...]:
        """What the report says of this graph alone."""
        return tuple(self.notes)

    def decline(self, given: GivenReason) -> None:
        """Gives the mixer up, with the reason that the report will show. The first reason stays."""
        if self.open:
            self.given = given


@dataclass
class CallCandidate(Candidate):
    """The call of a known function, which the graph holds as one node.

    Args:
        captured: the function.
        bound: the call's arguments, once the pass `bind` has read them.
    """

    captured: CapturedFunction = field(kw_only=True)
    bound: Arguments | None = None

    origin = "function"

    @property
    def call(self) -> Arguments:
        """The call's arguments, of a candidate that `bind` has not declined."""
        assert self.bound is not None
        return self.bound

    @property
    def rows_and_tokens(self) -> tuple[Any, Any]:
        """How many rows and tokens it has."""
        return self.call.sizes["B"], self.call.sizes.get("T", 1)

    def activations(self) -> list[fx.Node]:
        """The nodes of the call's activations: every tensor argument that has a batch axis, the state apart."""
        names = [t.name for t in self.captured.entry.tensors if t.axes.startswith("B") and not t.is_state]
        return self._nodes(names)

    def values(self) -> list[fx.Node]:
        """As `Candidate.values`: the argument that has them."""
        return self._nodes([self.captured.entry.value.name])

    def _nodes(self, names: list[str]) -> list[fx.Node]:
        return [n for n in (self.node.kwargs.get(name) for name in names) if isinstance(n, fx.Node)]

    def batch_first(self, node: fx.Node) -> tuple[int, int] | None:
        """As `Candidate.batch_first`; only [B, T, D] is known to be one."""
        value = node.meta.get("example_value")
        if not isinstance(value, torch.Tensor) or value.dim() != 3 or not value.is_floating_point():
            return None
        same = all(statically_known_true(a == b) for a, b in zip(value.shape, self.rows_and_tokens, strict=False))
        return (0, 1) if same else None

    @property
    def arguments(self) -> dict[str, Any]:
        """The call's arguments as Dynamo knows them: fake tensors and constants."""
        return fx.map_arg(dict(self.node.kwargs), lambda n: n.meta["example_value"])  # type: ignore[return-value]

    @property
    def family(self) -> str:
        """What the field calls it."""
        return self.captured.entry.family

    @property
    def has_time(self) -> bool:
        """Whether it works on a sequence, and not on a single token."""
        return self.bound is not None and "T" in self.bound.sizes

    @property
    def packed(self) -> bool:
        """Whether the call says itself where its sequences are."""
        return self.bound is not None and any(self.bound[name] is not None for name in self.captured.entry.packing)


@dataclass
class GraphCandidate(Candidate):
    """A part of the graph that was recognised by what it computes, with the denominators that go with it."""

    found: Found = field(kw_only=True)
    denominators: list[Found] = field(default_factory=list)

    @property
    def rows_and_tokens(self) -> tuple[Any, Any]:
        """How many rows and tokens it has."""
        return self.found.rows_and_tokens

    def activations(self) -> list[fx.Node]:
        """The nodes of its operands that depend on the model's input."""
        return self.found.activations()

    def values(self) -> list[fx.Node]:
        """As `Candidate.values`."""
        value = self.found.hypothesis.value
        return [] if value is None else self.found.nodes_of(value)

    def batch_first(self, node: fx.Node) -> tuple[int, int] | None:
        """As `Candidate.batch_first`."""
        return self.found.batch_first(node)

    @property
    def family(self) -> str:
        """What the field calls it."""
        return SELECTIVE_SCAN if self.found.is_selective else super().family

    @property
    def group(self) -> tuple[Found, ...]:
        """The denominators and the mixer."""
        return (*self.denominators, self.found)

    @property
    def placed(self) -> list[tuple[Found, tuple[Found, ...]]]:
        """The parts of the group that have a place in the graph, each with those that are computed at the same place:
        a divisor inside of a loop that is the mixer's."""
        inside = tuple(d for d in self.denominators if isinstance(d.output, Row))
        return [*((d, ()) for d in self.denominators if d not in inside), (self.found, inside)]

    @property
    def all_notes(self) -> tuple[str, ...]:
        """What the report says of this graph alone."""
        return (*self.notes, *self.found.notes())
