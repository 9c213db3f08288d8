"""The graphs of a program: the whole, and the bodies of its higher-order calls (activation checkpointing, say)."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import fx
from torch._ops import HigherOrderOperator

from llcompile.patterns.graph.effects import Effects


@dataclass(eq=False)
class Region:
    """One graph. A body knows the call that runs it, and hands tensors of the outer graph in as further operands.

    Args:
        module: the graph's module.
        parent: the region whose graph has the call; None for the whole program.
        call: the higher-order call.
        body: position of the body among the call's arguments; its operands follow.
    """

    module: fx.GraphModule
    parent: Region | None = None
    call: fx.Node | None = None
    body: int = 0
    _lifted: dict[fx.Node, fx.Node] = field(default_factory=dict)

    @property
    def graph(self) -> fx.Graph:
        """The region's graph."""
        return self.module.graph

    @property
    def root(self) -> Region:
        """The region of the whole program."""
        return self if self.parent is None else self.parent.root

    @functools.cached_property
    def effects(self) -> Effects:
        """What the graph's nodes write to; asked for before a pass has changed the graph."""
        return Effects(self.module, self.graph)

    @property
    def closed(self) -> str:
        """Why tensors cannot be handed into this region (the operator's name), or "" where they can."""
        if self.parent is None or self.call is None:
            return ""
        operands = self.call.args[self.body + 1 :]
        fits = len(operands) == len(self._placeholders()) and all(isinstance(o, fx.Node) for o in operands)
        return self.parent.closed if fits and not self.call.kwargs.get("identifier") else str(self.call.target)

    def outer(self, node: fx.Node) -> fx.Node:
        """The node of the whole program's graph that fills a placeholder; any other node is itself."""
        if self.parent is None or self.call is None or node.op != "placeholder" or self.closed:
            return node
        operand = self.call.args[self.body + 1 + self._placeholders().index(node)]
        assert isinstance(operand, fx.Node)
        return self.parent.outer(operand)

    def lift(self, node: fx.Node) -> fx.Node:
        """A node of the whole program's graph as a node of this one: a further operand of each call on the way."""
        if self.parent is None or self.call is None:
            return node
        if node not in self._lifted:
            operand = self.parent.lift(node)
            with self.graph.inserting_after(self._placeholders()[-1]):
                placeholder = self.graph.placeholder(node.name)
            placeholder.meta["example_value"] = node.meta["example_value"]
            self.call.args = (*self.call.args, operand)
            self._lifted[node] = placeholder
        return self._lifted[node]

    def _placeholders(self) -> list[fx.Node]:
        return list(self.graph.find_nodes(op="placeholder"))


def regions(module: fx.GraphModule) -> list[Region]:
    """Every region of the program, the whole first."""
    return list(_walk(Region(module)))


def _walk(region: Region) -> Iterator[Region]:
    yield region
    for node in region.graph.nodes:
        if node.op == "call_function" and isinstance(node.target, HigherOrderOperator):
            for position, argument in enumerate(node.args):
                if isinstance(argument, fx.Node) and argument.op == "get_attr":
                    body = getattr(region.module, str(argument.target), None)
                    if isinstance(body, fx.GraphModule):
                        yield from _walk(Region(body, region, node, position))
