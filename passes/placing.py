"""Placing: where in the graph a part's result is read, where its operands are, and what they still hold there.

A value has several nodes where code computes it again, or where a rewrite has put its result in another's place.

The part was recognised in a program without writes; the graph has them. An operand may be changed in place between its
use and the end of the part, the result afterwards, both through views of them. Where the operator cannot be put in
without changing what the program means, the part is declined.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass

from torch import fx

from llcompile.passes.candidate import GraphCandidate
from llcompile.passes.session import Session
from llcompile.patterns import reasons
from llcompile.patterns.graph.effects import Effects, Storages
from llcompile.patterns.reasons import GivenReason
from llcompile.patterns.structure.found import Found
from llcompile.patterns.structure.lift import bases_of
from llcompile.patterns.structure.lifted import Lifted, LiveIn
from llcompile.patterns.structure.program import Row, Value
from llcompile.torch_internals.places import user_line


class CannotPlace(Exception):
    """The rewrite would change what the program means."""

    def __init__(self, given: GivenReason) -> None:
        super().__init__(given.text)
        self.given = given


@dataclass(frozen=True)
class Place:
    """Where a part's result goes.

    Args:
        anchor: the node after which it is computed.
        result: a node that shows the part's result behind the anchor.
        carriers: the nodes in whose place the new result is read behind the anchor.
        written: whether the program changes the result in place.
        reads: the node that an operand was found at -> the node that it is read from.
        copied: those of the nodes read that are changed in place; a copy of them is read.
    """

    anchor: fx.Node
    result: fx.Node
    carriers: tuple[fx.Node, ...]
    written: bool
    reads: Mapping[fx.Node, fx.Node]
    copied: frozenset[fx.Node]


def place(graph: fx.Graph, effects: Effects, found: Found, reads: Iterable[fx.Node] = (), trains: bool = True) -> Place:
    """Where the operator goes for a part.

    Args:
        graph: the part's.
        effects: the graph's.
        found: the part.
        reads: nodes that the rewrite reads beside the part's operands.
        trains: gradients are taken here: an operand must keep its numbers until then.

    Raises:
        CannotPlace: the rewrite would change what the program means.
    """
    return _Placer(graph, effects, found).place([*operand_nodes(found), *reads], trains)


def placing(session: Session) -> int:
    """Declines each hand-written mixer whose rewrite would change the program; returns how many."""
    before = sum(candidate.open for candidate in session.candidates)
    for candidate in session.candidates:
        for found, sides in candidate.placed if candidate.open and isinstance(candidate, GraphCandidate) else ():
            if found is not None:
                try:
                    reads = [node for side in sides for node in operand_nodes(side)]
                    place(candidate.region.graph, candidate.region.effects, found, reads)
                except CannotPlace as problem:
                    candidate.decline(problem.given)
    return before - sum(candidate.open for candidate in session.candidates)


def operand_nodes(found: Found) -> list[fx.Node]:
    """The nodes that the operator's operands are read from.

    Raises:
        CannotPlace: an operand is what a tensor was at a time at which no node returned it.
    """
    values = dict.fromkeys(v for live_in in found.hypothesis.layouts for v in _values(live_in))
    if found.tail is not None:
        values.update(dict.fromkeys(_values(found.tail.root, {found.tail.joined, *found.tail.sides})))
    nodes = []
    for value in values:
        if value.node is None:
            raise CannotPlace(reasons.OPERAND_CHANGED())
        nodes.append(value.node)
    return nodes


def is_changed(effects: Effects, node: fx.Node, after: fx.Node) -> bool:
    """Whether something behind a node changes, in place, what another shows."""
    if not effects.is_written(node):
        return False
    nodes = list(after.graph.nodes)
    shown = effects.shows(node)
    return any(not shown.isdisjoint(effects.writes(later)) for later in nodes[nodes.index(after) + 1 :])


def copy_behind(node: fx.Node) -> fx.Node:
    """A copy of a tensor as it is when it is computed, which later writes to it do not change."""
    graph = node.graph
    after = node if node.op != "placeholder" else list(graph.find_nodes(op="placeholder"))[-1]
    with graph.inserting_after(after):
        return graph.call_method("clone", (node,))


class _Placer:
    def __init__(self, graph: fx.Graph, effects: Effects, found: Found) -> None:
        self.effects, self.found, self.anchor = effects, found, found.anchor
        self.nodes = list(graph.nodes)
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self.end = self.position[self.anchor]

    def place(self, operands: list[fx.Node], trains: bool) -> Place:
        carriers = self._carriers()
        result = self.found.output.node
        result = next(node for node in carriers if self._is_before(node)) if result is None else result
        shown = self.effects.shows(result)
        if self.effects.outlives(shown):
            raise CannotPlace(reasons.OUTPUT_OUTLIVES())
        written = self._writes(shown, self.end)
        apart = [node for node in carriers if shown.isdisjoint(self.effects.shows(node))]
        changed = written or [w for node in apart for w in self._writes(self.effects.shows(node), self.end)]
        if changed and apart:
            raise CannotPlace(reasons.COMPUTED_TWICE(where=_line(changed[0])))
        if written:
            carriers = self._shown_alike(shown, result, written[0])
        else:
            carriers = [n for n in carriers if n in apart or self.effects.view(n) == self.effects.view(result)]
        reads = {node: self._read(node) for node in operands}
        copied = frozenset(node for node in reads.values() if self._changes(node, trains))
        return Place(self.anchor, result, tuple(carriers), bool(written), reads, copied)

    def _read(self, operand: fx.Node) -> fx.Node:
        """The operand's node; where that is gone or stands behind the anchor, the first one that returned its value."""
        if self._is_before(operand):
            return operand
        results = self.found.program.results
        value = results.get(operand)
        same = [node for node, held in results.items() if held is value and self._is_before(node)]
        if not same:
            raise CannotPlace(reasons.OPERAND_LOST())
        return min(same, key=self.position.__getitem__)

    def _carriers(self) -> list[fx.Node]:
        """The nodes that are the part's result when something behind the anchor reads them."""
        program, output = self.found.program, self.found.output
        found = dict.fromkeys(
            node
            for (user, node), value in program.reads.items()
            if value is output and self.position.get(user, -1) > self.end and node in self.position
        )
        if output.node is not None:
            found.setdefault(output.node)
        return list(found)

    def _shown_alike(self, shown: Storages, result: fx.Node, write: fx.Node) -> list[fx.Node]:
        """All nodes that show the changed memory behind the anchor: they have to show it as the result does."""
        nodes = [
            node
            for node in self.nodes[: self.end + 1]
            if not shown.isdisjoint(self.effects.shows(node)) and any(map(self._is_behind, node.users))
        ]
        for node in nodes:
            if self.effects.view(node) != self.effects.view(result) or self.effects.shows(node) != shown:
                raise CannotPlace(reasons.OUTPUT_CHANGED(where=_line(write)))
        return nodes

    def _changes(self, operand: fx.Node, trains: bool) -> bool:
        """Whether an operand is not any more what it was, when the operator or its backward reads it."""
        writes = self._writes(self.effects.shows(operand), self.position[operand])
        return bool(writes) and (trains or self._is_before(writes[0]))

    def _writes(self, storages: Storages, position: int) -> list[fx.Node]:
        """What changes the memory behind a position."""
        later = self.nodes[position + 1 :]
        return [node for node in later if not storages.isdisjoint(self.effects.writes(node))]

    def _is_before(self, node: fx.Node) -> bool:
        return self.position.get(node, self.end + 1) <= self.end

    def _is_behind(self, node: fx.Node) -> bool:
        return self.position.get(node, -1) > self.end


def _line(node: fx.Node) -> str:
    return user_line(node.meta) or node.name


def _values(live_in: LiveIn, computed: Container[Value] = ()) -> list[Value]:
    """The values that a live-in is read from, but for those that the rewrite computes: of a row, its pieces."""
    bases = bases_of(live_in) if isinstance(live_in, Lifted) else [live_in]
    given = [base for base in bases if base not in computed]
    return [v for base in given for v in (base.op.inputs if isinstance(base, Row) and base.op else [base])]
