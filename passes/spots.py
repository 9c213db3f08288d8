"""Spots: the nodes of a graph by where they stand in the user's code, so that another graph of it has them, too."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from llcompile.passes.names import code_lines

Call = tuple[str, str]  # of a module, as `nn_module_stack` has it: the key, and the path to the module


@dataclass(frozen=True)
class Spot:
    """Where a node stands: the lines of code, what it calls, and how many such calls come after it."""

    lines: tuple[tuple[str, int], ...]
    target: str
    after: int


class Spots:
    """The nodes of a graph by where they stand, seen from a module."""

    def __init__(self, graph: fx.Graph, owner: nn.Module | None) -> None:
        self.nodes, self.owner = list(graph.nodes), owner
        self.known: dict[str, tuple[tuple[str, int], ...]] = {}

    def of(self, node: fx.Node, call: Call | None = None, before: fx.Node | None = None) -> Spot:
        """The spot of a node: among those of a call, or of those before another node.

        Raises:
            LookupError: nothing says where it stands.
        """
        lines, target = self._lines(node), _called(node)
        for after, other in enumerate(self._alike(lines, target, call, before)):
            if other is node and (lines or node.op == "placeholder"):
                return Spot(lines, target, after)
        raise LookupError(node.name)

    def at(self, spot: Spot, call: Call | None = None, before: fx.Node | None = None) -> fx.Node:
        """The node at a spot.

        Raises:
            LookupError: there is none.
        """
        alike = self._alike(spot.lines, spot.target, call, before)
        node = next(itertools.islice(alike, spot.after, None), None)
        if node is None:
            raise LookupError(str(spot))
        return node

    def _alike(self, lines: Any, target: str, call: Call | None, before: fx.Node | None) -> Iterator[fx.Node]:
        """The last first."""
        passed = before is None
        for node in reversed(self.nodes):
            alike = passed and _called(node) == target and (call is None or call in stack_of(node))
            if alike and self._lines(node) == lines:
                yield node
            passed = passed or node is before

    def _lines(self, node: fx.Node) -> tuple[tuple[str, int], ...]:
        stack = node.meta.get("stack_trace") or ""
        if stack not in self.known:
            self.known[stack] = code_lines(node.meta, self.owner) if stack else ()
        return self.known[stack]


def _called(node: fx.Node) -> str:
    return node.op if node.op == "get_attr" else str(getattr(node.target, "__name__", node.target))


def stack_of(node: fx.Node) -> list[Call]:
    """The calls of modules that a node was traced in, the outermost first."""
    return [(key, str(entry[0])) for key, entry in (node.meta.get("nn_module_stack") or {}).items()]
