"""Marks: what a forward pre-hook of ours puts into the graph that Dynamo traces through it.

A mark hands the level weights of a module, as they are in that call, to the graph: parameters, the tensors of a
`functional_call`, what a wrapper or parametrisation makes of them. The rewrite reads them there. Whoever is marked has
run in this frame. Marks are taken out before any other pass looks at the graph.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from llcompile.patterns.graph.regions import Region
from llcompile.torch_internals import reach

# Begins the name of a mark that hands in a parameter of the owner, and no level weights.
PARAMETER = "parameter:"


@torch._dynamo.allow_in_graph
def mark(name: str, *tensors: torch.Tensor) -> None:
    """A node of the graph that says: the module being traced has these tensors as its level weights `name`."""


@dataclass(frozen=True)
class Mark:
    """The level weights of one call of one module.

    Args:
        region: the graph that the call was traced in.
        key: the call's key in `nn_module_stack`: the module's id, with "@n" for the nth call.
        name: the attribute of the module that holds the level weights.
        tensors: their nodes, in the order of `LevelWeights.tensors()`.
    """

    region: Region
    key: str
    name: str
    tensors: tuple[fx.Node, ...]

    @property
    def owner(self) -> str:
        """The module's id."""
        return self.key.split("@")[0]


def take(regions: Iterable[Region]) -> tuple[Mark, ...]:
    """The marks of a program, which are taken out of its graphs."""
    found = []
    for region in regions:
        for node in list(region.graph.find_nodes(op="call_function", target=mark)):
            name, *tensors = node.args
            key = next(reversed(node.meta.get("nn_module_stack") or {"": None}))
            if key and all(isinstance(tensor, fx.Node) for tensor in tensors):
                found.append(Mark(region, key, str(name), tuple(tensors)))  # type: ignore[arg-type]
            region.graph.erase_node(node)
    for mark_ in found:
        _say_what_it_stands_for(mark_)
    return tuple(found)


def _say_what_it_stands_for(found: Mark) -> None:
    """A tensor of a `functional_call` is known as the parameter in whose place it stands."""
    owner = reach.find_module(found.key)
    if owner is not None and found.name.startswith(PARAMETER):
        node = found.region.outer(found.tensors[0])
        node.meta["stands_for"] = dict(owner.named_parameters()).get(found.name.removeprefix(PARAMETER))


def marked_tensors(marks: Iterable[Mark], region: Region, key: str, name: str) -> tuple[fx.Node, ...] | None:
    """The level weights `name` that the call `key` of a module had, as nodes that the region can read; or None."""
    for found in marks:
        if found.key == key and found.name == name:
            if found.region is region:
                return found.tensors
            outer = [found.region.outer(node) for node in found.tensors]
            if all(node.graph is region.root.graph for node in outer) and not region.closed:
                return tuple(region.lift(node) for node in outer)
    return None
