"""Masked values: whether a masked token writes nothing to a mixer's state, as the code stands.

A mask zeroes features; a bias behind it gives padded tokens values again, and then they are tokens like others. The
nodes between the mask and the mixer's values are run on zeros. Products with parameters are not computed: without a
bias they keep zeros, with one they do not.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from llcompile.passes.candidate import Candidate
from llcompile.patterns.agreement import undisturbed
from llcompile.patterns.graph.run import run
from llcompile.patterns.graph.walk import walk
from llcompile.torch_internals.sizes import size_hint

log = logging.getLogger("llcompile")

# Targets -> where their bias is among the arguments, None where they have none.
_PRODUCTS: dict[Any, int | None] = {
    **dict.fromkeys((F.linear, torch._C._nn.linear, F.conv1d, torch.conv1d, F.conv2d, torch.conv2d), 2),
    **dict.fromkeys((torch.matmul, torch.bmm, torch.einsum, "matmul", "bmm"), None),
}


def writes_nothing(candidate: Candidate, masked: Iterable[fx.Node]) -> bool:
    """Whether the values of tokens that the masked nodes zero are zero, too; where that cannot be seen, they are."""
    values = candidate.values()
    with undisturbed():
        try:
            results = _run(candidate, set(masked), values)
            return all(_is_zero(results[value]) for value in values)
        except Exception as error:  # a node that does not run on its own: the whole model's comparison decides
            log.debug("padding: the nodes behind a mask do not run on zeros: %s", error)
            return True


def _run(candidate: Candidate, masked: set[fx.Node], values: list[fx.Node]) -> dict[fx.Node, Any]:
    """Results of the nodes between the masked ones, which are zero, and the values; what needs no mask is drawn."""
    between = _between(masked, values)
    results: dict[fx.Node, Any] = {}
    drawn: set[fx.Node] = set()
    for node in candidate.node.graph.nodes:
        if node not in between:
            continue
        if node in masked:
            results[node] = torch.zeros_like(_drawn(node))
        elif drawn.issuperset(node.all_input_nodes):
            results[node] = _drawn(node)
            drawn.add(node)
        else:
            results[node] = _result(node, results)
    return results


def _between(masked: set[fx.Node], values: list[fx.Node]) -> set[fx.Node]:
    return set(walk(values, lambda node: () if node in masked else node.all_input_nodes))


def _result(node: fx.Node, results: dict[fx.Node, Any]) -> Any:
    if node.target in _PRODUCTS:
        return _product(node, results)
    args, kwargs = fx.map_arg((node.args, node.kwargs), results.__getitem__)
    return run(node, args, kwargs)


def _product(node: fx.Node, results: dict[fx.Node, Any]) -> Tensor:
    place, drawn = _PRODUCTS[node.target], _drawn(node)
    bias = node.args[place] if place is not None and len(node.args) > place else node.kwargs.get("bias")
    zero = any(_is_zero(results[n]) for n in node.all_input_nodes)
    return torch.zeros_like(drawn) if zero and bias is None else drawn


def _is_zero(result: Any) -> bool:
    return isinstance(result, Tensor) and not bool(result.any())


def _drawn(node: fx.Node) -> Any:
    """Random numbers with the shape of a node's tensor; other values as they are in the example."""
    value = node.meta.get("example_value")
    if isinstance(value, (tuple, list)):
        return type(value)(_random(x) for x in value)
    return _random(value)


def _random(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return size_hint(value)
    shape = [size_hint(size) for size in value.shape]
    if value.is_floating_point():
        return torch.rand(shape, dtype=value.dtype) + 0.5
    return torch.ones(shape, dtype=value.dtype)
