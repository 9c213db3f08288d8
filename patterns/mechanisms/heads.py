"""How many heads an attention has, and how many groups of keys, whatever the layout of its tensors.

Scores are heads x queries x keys numbers for each sequence of the batch; how many tokens there are is read off the
projection that the queries come from.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from torch import fx

from llcompile.patterns.mechanisms.facts import Facts
from llcompile.patterns.mechanisms.vocabulary import PROJECTIONS, SPREADING

# Between a projection and the product: norms, rotations, caches, views.
_REACH = 48


@dataclass(frozen=True)
class Heads:
    """Numbers of heads and of groups that share keys and values; None where the graph does not tell."""

    heads: int | None = None
    groups: int | None = None

    @property
    def text(self) -> str:
        """As the report says it."""
        if self.heads is None:
            return ""
        if self.heads == 1:
            return "1 head"
        named = {None: "", 1: "MQA, ", self.heads: "MHA, "}.get(self.groups, "GQA, ")
        over = f" over {self.groups} groups" if named == "GQA, " else ""
        return f"{named}{self.heads} heads{over}"


def heads_of(facts: Facts, node: fx.Node, scores: fx.Node, query: fx.Node, key: fx.Node) -> Heads:
    """Of an attention with these operands; `scores` is the node itself where one call is all of it."""
    if scores is node:
        return _of_axes(facts, query, key)
    shape, dim = facts.shapes.get(scores, ()), node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else -1)
    axis = dim if isinstance(dim, int) and -len(shape) <= dim < len(shape) else -1
    if facts.names[scores] == "einsum" and _has_keys(scores, query, axis):
        query, key = key, query
    return _of_counts(facts, scores, query, key, axis)


def _has_keys(scores: fx.Node, operand: fx.Node, axis: int) -> bool:
    """Whether the first factor of an einsum has the axis of the keys: the order of factors means nothing there."""
    inputs, output = str(scores.args[0]).replace(" ", "").split("->")
    return output[axis] in inputs.split(",")[0]


def _of_axes(facts: Facts, query: fx.Node, key: fx.Node) -> Heads:
    """The fused calls take [B, H, T, K]."""
    shape, of_key = facts.shapes.get(query, ()), facts.shapes.get(key, ())
    if len(shape) < 4 or len(of_key) < 4:
        return _merged(facts, query, key)
    return _checked(shape[-3], of_key[-3] / _copies(facts, key))


def _merged(facts: Facts, query: fx.Node, key: fx.Node) -> Heads:
    """[B * H, T, K], or [B, T, K] of one head: told by how many tokens the queries were projected from."""
    tokens = _tokens(facts, query)
    shape = facts.shapes.get(query, ())
    if tokens is None or len(shape) < 2:
        return Heads()
    heads = prod(shape[:-1]) / prod(tokens)
    return _checked(heads, heads / _copies(facts, key))


def _of_counts(facts: Facts, scores: fx.Node, query: fx.Node, key: fx.Node, axis: int) -> Heads:
    tokens, shape = _tokens(facts, query), facts.shapes.get(scores, ())
    if tokens is None or not shape:
        plain = len(shape) == 4 and facts.names[scores] == "matmul"
        return _checked(shape[1], facts.shapes[key][1] / _copies(facts, key)) if plain else Heads()
    keys, width = shape[axis], 0.0
    maps = facts.size(scores) / (prod(tokens) * keys)
    if maps >= 1:
        width = facts.size(query) / (prod(tokens) * maps)
    if facts.names[scores] == "sum" or not width:  # broadcast factors: the key is as large as the product
        return _checked(maps, None)
    merged = len(tokens) == 1 and tokens[0] % keys == 0
    length = keys if merged or keys in tokens else tokens[-1]
    batch = prod(tokens) / length
    return _checked(maps, facts.size(key) / (batch * keys * width) / _copies(facts, key))


def _checked(heads: float, groups: float | None) -> Heads:
    """Only whole numbers that divide each other are believed."""
    if heads < 1 or heads != int(heads):
        return Heads()
    if groups is None or groups < 1 or groups != int(groups) or heads % groups:
        return Heads(int(heads))
    return Heads(int(heads), int(groups))


def _tokens(facts: Facts, node: fx.Node) -> tuple[int, ...] | None:
    """The axes before the features of what the node was projected from."""
    for n in facts.above(node, lambda n: facts.names[n] in PROJECTIONS, _REACH):
        if facts.names[n] == "linear" and isinstance(n.args[0], fx.Node):
            return facts.shapes[n.args[0]][:-1]
        if facts.names[n] in ("matmul", "mm", "einsum", "addmm") and not facts.learned.isdisjoint(facts.inputs[n]):
            source = next((o for o in facts.inputs[n] if o in facts.activations), None)
            return None if source is None else facts.shapes[source][:-1]
    return None


def _copies(facts: Facts, node: fx.Node) -> float:
    """How often each key was copied on the way from its projection."""
    copies = 1.0
    for _ in range(_REACH):
        if facts.names[node] in PROJECTIONS:
            break
        larger = [n for n in facts.inputs[node] if n in facts.activations]
        if not larger:
            break
        source = max(larger, key=facts.size)
        if facts.names[node] in SPREADING and facts.size(source):
            copies *= facts.size(node) / facts.size(source)
        node = source
    return copies
