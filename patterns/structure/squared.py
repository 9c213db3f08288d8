"""Squared: tensors that code multiplies with themselves, so that a mixer's query, key and value may be one tensor."""

from __future__ import annotations

import operator
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import fx

from llcompile.patterns.structure.moves import names

_PRODUCTS = frozenset({torch.einsum, torch.matmul, torch.bmm, operator.matmul, "matmul", "bmm"})
_PROJECTIONS = frozenset({torch._C._nn.linear, F.linear, torch.addmm})
_VIEWS = names("transpose swapaxes permute movedim mT T t view reshape flatten unflatten unsqueeze squeeze contiguous")
_DEEPEST = 6  # views of views
_MOST = 8  # tensors of earlier products that are remembered: queries, keys and values are near each other


def squared(graph: fx.Graph) -> Mapping[fx.Node, frozenset[fx.Node]]:
    """Product -> those of its operands that it takes twice, or that are part of another operand as well.

    An operand may be a view of the tensor.
    """
    held: dict[fx.Node, frozenset[fx.Node]] = {}  # the tensors whose products a node is made of
    twice: set[fx.Node] = set()
    bases: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        inside = frozenset[fx.Node]().union(*(held.get(n, ()) for n in node.all_input_nodes))
        if node.target in _PRODUCTS:
            bases[node] = [_base(given) for given in _operands(node)]
            twice.update(b for b in bases[node] if bases[node].count(b) > 1 or b in inside)
            inside = inside.union(bases[node])
        if inside and len(inside) <= _MOST and node.target not in _PROJECTIONS:
            held[node] = inside
    return {
        node: frozenset(given for given in _operands(node) if _base(given) in twice)
        for node, of in bases.items()
        if not twice.isdisjoint(of)
    }


def _operands(node: fx.Node) -> list[fx.Node]:
    """The tensors that a node takes, as often as it takes them."""
    found: list[fx.Node] = []
    fx.map_arg(node.args, found.append)
    return found


def _base(node: fx.Node) -> fx.Node:
    """What a tensor is a view of."""
    for _ in range(_DEEPEST):
        if _name(node) not in _VIEWS or len(node.all_input_nodes) != 1:
            break
        (node,) = node.all_input_nodes
    return node


def _name(node: fx.Node) -> str:
    """What is called: a method, an attribute or a function."""
    if node.op == "call_method":
        return str(node.target)
    if node.target is getattr:
        return str(node.args[1])
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""
