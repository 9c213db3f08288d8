"""What is asked about a graph again and again, found out once in one sweep."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import fx, nn

from llcompile.patterns.graph.regions import Region
from llcompile.patterns.mechanisms.vocabulary import MADE, PRODUCTS, SHAPED, operation
from llcompile.torch_internals.inputs import input_value

Shape = tuple[int, ...]


@dataclass(eq=False)
class Facts:
    """One region's graph.

    Args:
        region: the region.
        position: of each node in the graph's order.
        names: what each node does, see `operation`.
        shapes: of each node that is a tensor; unknown sizes by the value that they had while the graph was traced.
        inputs: what each node reads; for a tensor that was written to in between, the write.
        users: the other way round.
        outer: for a placeholder of a scan's body, what it is a part of in the graph around.
        activations: nodes that depend on what the model is given.
        learned: nodes that depend on parameters and on nothing that the model is given.
    """

    region: Region
    position: dict[fx.Node, int] = field(default_factory=dict)
    names: dict[fx.Node, str] = field(default_factory=dict)
    shapes: dict[fx.Node, Shape] = field(default_factory=dict)
    inputs: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)
    users: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)
    outer: dict[fx.Node, tuple[Facts, fx.Node]] = field(default_factory=dict)
    activations: set[fx.Node] = field(default_factory=set)
    learned: set[fx.Node] = field(default_factory=set)

    def __post_init__(self) -> None:
        effects = self.region.effects
        written: dict[int, fx.Node] = {}  # memory -> what was last written to it
        for position, node in enumerate(self.region.graph.nodes):
            self.position[node] = position
            name = self.names[node] = operation(node)
            shape = shape_of(node)
            if shape is not None:
                self.shapes[node] = shape
            read = node.all_input_nodes[:1] if name in SHAPED else node.all_input_nodes
            read = [self._at_last(n, effects.shows(n), written) for n in read] if written else read
            self.inputs[node], self.users[node] = read, []
            for n in read:
                self.users[n].append(node)
            written.update(dict.fromkeys(effects.writes(node), node))
            self._classify(node, read)

    def _at_last(self, node: fx.Node, shown: Iterable[int], written: Mapping[int, fx.Node]) -> fx.Node:
        """The node, or what was written to its memory since."""
        writes = [written[number] for number in shown if number in written]
        return max([node, *writes], key=lambda n: self.position[n])

    def _classify(self, node: fx.Node, read: list[fx.Node]) -> None:
        if node.op == "placeholder":
            self._enter(node)
        elif self.names[node] in MADE:
            return
        elif not self.activations.isdisjoint(read):
            self.activations.add(node)
            effects, changed = self.region.effects, self.region.effects.writes(node)
            self.activations.update(n for n in read if changed and not changed.isdisjoint(effects.shows(n)))
        elif not self.learned.isdisjoint(read):
            self.learned.add(node)

    @property
    def nodes(self) -> Iterable[fx.Node]:
        """The nodes in the graph's order."""
        return self.position

    def size(self, node: fx.Node) -> int:
        """How many numbers a tensor has; 0 where that is not known."""
        shape = self.shapes.get(node)
        return 0 if shape is None else prod(shape)

    def factors(self, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """The two tensors that both depend on the input and that the node multiplies and sums over an axis."""
        name = self.names[node]
        if name in PRODUCTS:
            operands = [n for n in _tensor_operands(node)[-2:] if n in self.activations]
        elif name == "linear":
            operands = [n for n in _tensor_operands(node)[:2] if n in self.activations]
        elif name == "sum" and node.args and isinstance(node.args[0], fx.Node) and self.names[node.args[0]] == "mul":
            operands = [n for n in _tensor_operands(node.args[0]) if n in self.activations]
        else:
            return None
        return (operands[0], operands[1]) if len(operands) == 2 else None

    def above(self, node: fx.Node, stop: Callable[[fx.Node], bool], reach: int = 64) -> Iterator[fx.Node]:
        """What the node is computed from, the nearest first, not beyond a node at which to stop; itself included."""
        return _walk(node, self.inputs, stop, reach)

    def below(self, node: fx.Node, stop: Callable[[fx.Node], bool], reach: int = 64) -> Iterator[fx.Node]:
        """What is computed from the node, the nearest first, not beyond a node at which to stop; itself included."""
        return _walk(node, self.users, stop, reach)

    def _enter(self, node: fx.Node) -> None:
        outer = self.region.outer(node)
        value = input_value(outer)
        example = outer.meta.get("example_value")
        if isinstance(value, nn.Parameter) or isinstance(example, nn.Parameter) or "_parameters_" in outer.name:
            self.learned.add(node)
        elif isinstance(example, torch.Tensor) and "_buffers_" not in outer.name:
            self.activations.add(node)


def shape_of(node: fx.Node) -> Shape | None:
    """The sizes of a node's tensor, without a guard on those that are symbols; None for what is no tensor."""
    value = node.meta.get("example_value")
    return tuple(hint(size) for size in value.shape) if isinstance(value, torch.Tensor) else None


def hint(size: Any) -> int:
    """A size as a number: for a symbol, the value that it had when the graph was traced."""
    if isinstance(size, int):
        return size
    known = getattr(getattr(size, "node", None), "hint", None)
    return int(known) if known is not None else -1


def _tensor_operands(node: fx.Node) -> list[fx.Node]:
    """The node's tensor arguments in order, one that is given twice twice."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, tuple(node.kwargs.values())), lambda n: found.append(n))
    return [n for n in found if isinstance(n.meta.get("example_value"), torch.Tensor)]


def _walk(
    node: fx.Node, step: Mapping[fx.Node, Iterable[fx.Node]], stop: Callable[[fx.Node], bool], reach: int
) -> Iterator[fx.Node]:
    queue, seen = [node], {node}
    for current in queue:  # grows while it is read
        yield current
        if current is not node and stop(current):
            continue
        for other in step[current]:
            if len(seen) < reach and other not in seen:
                seen.add(other)
                queue.append(other)
