"""Drawing: a mixer's nodes, and a few around them, as boxes and edges."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import fx

from llcompile.look.code import Step, steps
from llcompile.look.records import Box, Drawing, Kind
from llcompile.passes.origin import is_constant_input

_FEW = 32  # operations that are drawn one by one; more are drawn line by line
_UP, _DOWN = 2, 2  # how far around the mixer the drawing goes


def draw(nodes: Sequence[fx.Node], module: str) -> Drawing:
    """The nodes of one graph and their surroundings.

    Args:
        nodes: the mixer's, in the order of the graph.
        module: the mixer's module, whose parameters are called `self.…`.
    """
    inside = set(nodes)
    around = _above(inside) | _below(inside)
    shown = [n for n in (nodes[0].graph.nodes if nodes else ()) if n in inside or n in around]
    made = dict(zip(shown, steps(shown, module), strict=True))
    fold = len(inside) > _FEW
    boxes: dict[str, Box] = {}
    box_of: dict[fx.Node, str] = {}
    for node, step in made.items():
        kind: Kind = "inside" if node in inside else "parameter" if _is_held(node) else "outside"
        name = f"line {step.where}" if fold and kind == "inside" and step.where else step.name
        box_of[node] = name
        boxes[name] = _box(name, step, kind, boxes.get(name), by_line=name != step.name)
    edges = ((box_of[parent], box_of[node]) for node in shown for parent in node.all_input_nodes if parent in box_of)
    return Drawing(tuple(boxes.values()), tuple(dict.fromkeys(e for e in edges if e[0] != e[1])))


def _box(name: str, step: Step, kind: Kind, before: Box | None, by_line: bool) -> Box:
    count = 1 if before is None else before.count + 1
    title = step.where.partition(" in ")[0].rpartition("/")[2] if by_line else step.operation
    if step.operation in ("placeholder", "get_attr"):
        title = step.name
    return Box(name, title, step.shape, kind, count, step.where)


def _above(inside: set[fx.Node]) -> set[fx.Node]:
    """What the mixer reads, and what that is made of: tensors that the model holds only where the mixer reads them."""
    found: set[fx.Node] = set()
    edge = inside
    for distance in range(_UP):
        parents = _parents(edge) - inside - found
        edge = {n for n in parents if distance == 0 or not _is_held(n)}
        found |= edge
    return found


def _below(inside: set[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    edge = inside
    for _ in range(_DOWN):
        edge = {user for node in edge for user in node.users if user.op != "output"} - inside - found
        found |= edge
    return found


def _parents(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    return {parent for node in nodes for parent in node.all_input_nodes}


def _is_held(node: fx.Node) -> bool:
    return node.op == "get_attr" or (node.op == "placeholder" and is_constant_input(node))
