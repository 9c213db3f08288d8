"""Recurrences that stay one call in the graph (scan, associative_scan), and scans written as trees."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations

from torch import fx
from torch.utils._pytree import tree_leaves

from llcompile.patterns.graph.regions import Region
from llcompile.patterns.mechanisms.axes import TimeAxes
from llcompile.patterns.mechanisms.facts import Facts
from llcompile.patterns.mechanisms.found import Found
from llcompile.patterns.mechanisms.recurrences import (
    FIXED,
    GATED,
    NONLINEAR,
    SELECTIVE_SCAN,
    STATE_SPACE,
    WHOLE,
    Recurrence,
    contracts,
    is_outer,
    name_of,
    serves_one,
)
from llcompile.patterns.mechanisms.vocabulary import EXPONENTIALS, PRODUCTS, PROJECTIONS, READS

# What only takes parts of a tensor, moves or joins them: between a tree's products, and between it and what it scans.
_MOVES = READS | {"pad", "cat", "roll", "movedim", "transpose", "permute", "flip", "unbind", "chunk", "split", "stack"}
_MOVES |= {
    "add_batch_dim",
    "remove_batch_dim",
    "flatten",
    "contiguous",
    "to",
    "view",
    "reshape",
    "unsqueeze",
    "squeeze",
}

_SCALED = {"mul", "div"}
# A tree has fewer nodes than this below any of its products.
_TREE = 4000


def find(facts: Facts, axes: TimeAxes) -> Iterator[Found]:
    """Every scan of a graph."""
    trees: dict[str, list[tuple[fx.Node, fx.Node, fx.Node]]] = {}
    for node in facts.nodes:
        name = facts.names[node]
        if name in WHOLE:
            yield Found(node, NONLINEAR, inside=frozenset((node,)))
        elif "selective_scan" in name:
            yield Found(node, SELECTIVE_SCAN, inside=frozenset((node,)))
        elif name in ("scan", "while_loop"):
            yield from _of_body(facts, node)
        elif name == "associative_scan":
            yield from _associative(facts, node)
        elif name in ("cumsum", "logcumsumexp") and node in facts.activations:
            yield from _accumulated(facts, node)
        elif name == "add" and node in facts.activations:
            parts = _composed(facts, node)
            if parts is not None:
                stack = node.meta.get("nn_module_stack") or {}
                trees.setdefault(next(reversed(stack), ""), []).append((node, *parts))
    for compositions in trees.values():
        yield from _tree(facts, compositions)


def _of_body(facts: Facts, node: fx.Node) -> Iterator[Found]:
    """Each carried tensor of a body that is a graph: from its placeholder to its place in the output."""
    body = next((a for a in reversed(node.args[:2]) if isinstance(a, fx.Node) and a.op == "get_attr"), None)
    module = getattr(facts.region.module, str(body.target), None) if body is not None else None
    if not isinstance(module, fx.GraphModule):
        return
    inner = Facts(Region(module))
    given = list(module.graph.find_nodes(op="placeholder"))
    inner.activations.update(n for n in given if n not in inner.learned)
    operands = [n for n in tree_leaves((node.args[1:], node.kwargs)) if isinstance(n, fx.Node) and n in facts.shapes]
    inner.outer.update((n, (facts, operand)) for n, operand in zip(given, operands, strict=False))
    made = fx.node.map_arg(next(iter(module.graph.find_nodes(op="output"))).args[0], lambda n: n)
    for state, after in zip(given, made, strict=False):
        if (
            not isinstance(after, fx.Node)
            or inner.size(state) < 2
            or inner.shapes.get(state) != inner.shapes.get(after)
        ):
            continue
        carried = _on_the_way(inner, state, after)
        kind = (
            name_of(inner, Recurrence(state, after, carried, tuple(facts.users[node]), outside=facts))
            if carried
            else ""
        )
        if kind:
            yield Found(node, kind, inside=frozenset((node,)))
            return


def _on_the_way(facts: Facts, first: fx.Node, last: fx.Node) -> frozenset[fx.Node]:
    reached = {first}
    for node in facts.nodes:
        if not reached.isdisjoint(facts.inputs[node]):
            reached.add(node)
    above = set(facts.above(last, lambda n: n is first, 400))
    return frozenset(above & reached - {first})


def _associative(facts: Facts, node: fx.Node) -> Iterator[Found]:
    """`h = a * h + u` as a product of pairs (a, u)."""
    body, leaves = node.args[0], node.args[1]
    module = getattr(facts.region.module, str(getattr(body, "target", "")), None)
    if not isinstance(module, fx.GraphModule) or not isinstance(leaves, (list, tuple)):
        return
    inner = Facts(Region(module))
    given = list(module.graph.find_nodes(op="placeholder"))
    inner.activations.update(given)
    parts = next((p for p in (_composed(inner, n) for n in module.graph.nodes if inner.names[n] == "add") if p), None)
    if parts is None or not set(parts) <= set(given):
        return
    decay, state = (leaves[given.index(p) % len(leaves)] for p in parts)
    if not isinstance(decay, fx.Node) or not isinstance(state, fx.Node):
        return
    kind = _kind(facts, decay, state, node)
    if kind:
        yield Found(node, kind, inside=frozenset((node,)))


def _tree(facts: Facts, compositions: list[tuple[fx.Node, fx.Node, fx.Node]]) -> Iterator[Found]:
    """Products of pairs at several places of the same sequence, written out."""
    node, decay, state = compositions[0]
    kind = _kind(facts, _origin(facts, decay), _origin(facts, state), compositions[-1][0])
    if kind:
        products = (n for _, a, _ in compositions for n in facts.users[a] if facts.names[n] == "mul")
        yield Found(node, kind, inside=frozenset((*products, *(n for n, _, _ in compositions))))


def _composed(facts: Facts, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """`a` and `u` of the later pair, if the node is `a * u' + u` and `a * a'` is computed, too: two steps as one."""
    products = [n for n in facts.inputs[node] if facts.names[n] == "mul" and len(facts.inputs[n]) == 2]
    for product in products:
        later = [n for n in facts.inputs[node] if n is not product]
        for decay, earlier in permutations(facts.inputs[product]):
            alike = _alike(facts, decay)
            users = {u for n in alike for u in facts.users[n] if u is not product and facts.names[u] == "mul"}
            both = {n for u in users for n in facts.inputs[u]} - alike | {decay}
            same = {_origin(facts, n) for n in both - {decay}}
            if later and decay is not earlier and _origin(facts, decay) in same:
                return decay, later[0]
            if later and decay.op == "placeholder" and any(n.op == "placeholder" for n in both - {decay, earlier}):
                return decay, later[0]
    return None


def _alike(facts: Facts, node: fx.Node) -> set[fx.Node]:
    """The node, and others that take the same from the same tensor (`a[:, 1:]`, written twice)."""
    bases = facts.inputs[node] if facts.names[node] in _MOVES else []
    call = node.target, node.args, node.kwargs
    return {node, *(n for base in bases[:1] for n in facts.users[base] if (n.target, n.args, n.kwargs) == call)}


def _origin(facts: Facts, node: fx.Node) -> fx.Node:
    """The tensor that the node is a part of."""
    while facts.names[node] in _MOVES and facts.inputs[node]:
        node = max(facts.inputs[node], key=facts.size)
    return node


def _accumulated(facts: Facts, node: fx.Node) -> Iterator[Found]:
    """`h = exp(c) * cumsum(u * exp(-c))`, where `c` is a sum of log decays, or the same with logarithms all through."""
    if facts.names[node] == "logcumsumexp":
        readers = facts.below(node, lambda n: facts.names[n] in PROJECTIONS | PRODUCTS | {"sum"})
        if not any(contracts(facts, n) for n in readers):
            yield Found(node, GATED, inside=frozenset((node,)))
        return
    scaled = node.args[0] if node.args else None
    if not isinstance(scaled, fx.Node) or facts.names[scaled] not in _SCALED:
        return
    undone = [n for u in facts.users[node] if facts.names[u] in _SCALED for n in facts.inputs[u] if n is not node]
    before = [n for n in facts.inputs[scaled] if facts.names[n] in EXPONENTIALS]
    if not before or not any(facts.names[n] in EXPONENTIALS for n in undone):
        return
    kind = _kind(facts, before[0], scaled, node)
    if kind:
        yield Found(node, kind, inside=frozenset((node,)))


def _kind(facts: Facts, decay: fx.Node, state: fx.Node, last: fx.Node) -> str:
    readers = facts.below(last, lambda n: facts.names[n] in PROJECTIONS | PRODUCTS | {"sum"}, _TREE)
    if not any(contracts(facts, n) for n in readers):
        return GATED if decay in facts.activations else FIXED
    if not serves_one(facts, decay, facts.shapes[state]) or not is_outer(facts, state):
        return ""  # one decay for a row of the state is linear attention; no products, its denominator
    return SELECTIVE_SCAN if decay in facts.activations else STATE_SPACE
