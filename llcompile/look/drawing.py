"""Drawing: a mixer's nodes, and a few around them, as boxes and edges."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import fx

from llcompile.look.code import Step, steps
from llcompile.look.mixer_look import Box, Drawing, Kind
from llcompile.passes.weight_input import is_constant_input

_FEW = 32  # operations that are drawn one by one; more are drawn line by line
_UP, _DOWN = 1, 1  # how far around the mixer the drawing goes


def draw(
    nodes: Sequence[fx.Node],
    module: str,
    folded: Mapping[fx.Node, str] | None = None,
    titles: Mapping[fx.Node, str] | None = None,
) -> Drawing:
    """The nodes of one graph and their surroundings.

    Args:
        nodes: the mixer's, in the order of the graph.
        module: the mixer's module, whose parameters are called `self.…`.
        folded: nodes that share a box, with its title. Without it, more than a few nodes are drawn line by line.
        titles: what nodes outside the mixer are called, instead of their own names.
    """
    inside = set(nodes)
    around = _above(inside) | _below(inside)
    shown = [n for n in (nodes[0].graph.nodes if nodes else ()) if n in inside or n in around]
    made = dict(zip(shown, steps(shown, module), strict=True))
    if folded is None:
        folded = {n: _line(made[n]) for n in nodes if made[n].where} if len(nodes) > _FEW else {}
    boxes: dict[str, Box] = {}
    box_of: dict[fx.Node, str] = {}
    for node, step in made.items():
        kind: Kind = "inside" if node in inside else "parameter" if _is_held(node) else "outside"
        # Outside, what a thing is called says more than how it was made.
        own = step.operation if kind == "inside" else (titles or {}).get(node) or re.sub(r"_\d+$", "", step.name)
        title = folded.get(node) or own
        name = f"folded {title}" if node in folded else step.name
        count = boxes[name].count + 1 if name in boxes else 1
        box_of[node] = name
        boxes[name] = Box(name, title, _short(step.shape), kind, count, step.where)
    edges = ((box_of[parent], box_of[node]) for node in shown for parent in node.all_input_nodes if parent in box_of)
    return Drawing(tuple(boxes.values()), tuple(dict.fromkeys(e for e in edges if e[0] != e[1])))


def _short(shape: str) -> str:
    """Of several results the first one's sizes, and no dtype: a box is small."""
    sizes = shape.lstrip("(").partition("]")
    return "".join(sizes[:2]) + (", …" if shape.startswith("(") else "")


def _line(step: Step) -> str:
    return step.where.partition(" in ")[0].rpartition("/")[2]


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
