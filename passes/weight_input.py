"""Weight input: what level weights are computed from.

That is the nearest tensor [B, T, D] that dominates the mixer's query, key and value, and that a projection reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import networkx as nx
import torch
import torch.nn.functional as F
from torch import fx, nn

from llcompile.passes.candidate import Candidate
from llcompile.patterns.graph.walk import walk
from llcompile.torch_internals import reach
from llcompile.torch_internals.dtensors import is_move
from llcompile.torch_internals.inputs import input_value, is_number, is_parameter, module_tensors

# Calls that project features: the level weights read what these read.
_PROJECTIONS = {F.linear, torch._C._nn.linear, torch.matmul, torch.nn.functional.bilinear}
# Steps between a tensor and its projection that do not change what it is.
_TRANSPARENT = {"to", "float", "contiguous", "type", "half", "bfloat16"}
_ROOT, _SINK = "root", "sink"
# What a mixer's operands are computed from, each node with those that it reads (`read_by`).
Read = dict[fx.Node, list[fx.Node]]


@dataclass(frozen=True)
class Role:
    """What level weights read, in words that hold in every frame.

    Args:
        own: it is an input of the module that owns the mixer.
        readers: names, below the owner, of the parameters that project it.
    """

    own: bool
    readers: frozenset[str]

    def fits(self, other: Role, cut: bool) -> bool:
        """Whether a graph's tensor has the role that was remembered.

        A whole graph is trusted where its readers were seen before: adapters and parametrisations give parameters other
        names, and a mask multiplies the input. A graph that a break has `cut` has to show the same readers.
        """
        if cut:
            return bool(self.readers & other.readers) or (self.own and other.own)
        return bool(self.readers) or self.own == other.own


def role_of(candidate: Candidate, owner: nn.Module, node: fx.Node) -> Role:
    """The role of a node of the candidate's graph."""
    names = {id(parameter): name for name, parameter in owner.named_parameters()}
    held = (input_value(candidate.region.outer(n)) for reader in _readers(node) for n in reader.all_input_nodes)
    readers = frozenset(names[id(parameter)] for parameter in held if id(parameter) in names)
    keys = {key.split("@")[0] for key in node.meta.get("nn_module_stack") or {}}
    inside = str(id(owner)) in keys or reach.root_module() is owner
    return Role(node.op == "placeholder" or not inside, readers)


def projection_input(candidate: Candidate, read: Read) -> fx.Node | None:
    """The node that the candidate's level weights are computed from, or None where no input dominates its operands.

    The candidates are the common dominators of q, k and v; the nearest one that a projection reads is taken, so that
    the same tensor is found while prefilling, training and decoding, whatever lies between (convolutions, caches).
    """
    candidates = [n for n in _dominators(candidate, read) if candidate.batch_first(n) is not None]
    projected = [n for n in candidates if is_projected(n)]
    return next(iter(projected or candidates), None)


def data_inputs(node: fx.Node) -> list[fx.Node]:
    """The nodes that a node reads for their values: not those that only say how large something is."""
    sizes = (int, torch.SymInt, torch.Size)
    return [n for n in node.all_input_nodes if not isinstance(n.meta.get("example_value"), sizes)]


def given(candidate: Candidate, read: Read) -> list[fx.Node]:
    """The program's inputs that the operands are computed from: no parameters, buffers, caches and masks."""
    return [node for node in read if _is_given(candidate, node)]


def read_by(candidate: Candidate) -> Read:
    """The operands and everything that they are computed from, the nearest first, each with the nodes that it reads."""
    found: Read = {}

    def onward(node: fx.Node) -> list[fx.Node]:
        # A mask says which tokens there are, and nothing about them.
        found[node] = [n for n in data_inputs(node) if n not in candidate.masks]
        return found[node]

    for _ in walk(candidate.activations(), onward):
        pass
    return found


def _is_given(candidate: Candidate, node: fx.Node) -> bool:
    return node.op == "placeholder" and not is_constant_input(candidate.region.outer(node))


def _above(candidate: Candidate, read: Read) -> nx.DiGraph[Any]:
    """Everything that the operands are computed from: from the root, over the inputs, to the operands and the sink."""
    graph: nx.DiGraph[Any] = nx.DiGraph()
    graph.add_edges_from((operand, _SINK) for operand in candidate.activations())
    for node, parents in read.items():
        graph.add_edges_from((parent, node) for parent in parents)
        if _is_given(candidate, node):
            graph.add_edge(_ROOT, node)
    return graph


def _dominators(candidate: Candidate, read: Read) -> list[fx.Node]:
    """Common dominators of the operands, the nearest first."""
    graph = _above(candidate, read)
    if _ROOT not in graph:
        return []
    immediate = nx.immediate_dominators(graph, _ROOT)
    chain, node = [], immediate.get(_SINK)
    while isinstance(node, fx.Node):
        chain.append(node)
        node = immediate.get(node)
    return chain


def is_constant_input(node: fx.Node) -> bool:
    """Parameters, buffers and numbers do not depend on the token; a cache's tensors, which the graph writes, are no
    input."""
    if not isinstance(node.meta.get("example_value"), torch.Tensor):
        return True
    if node.op != "placeholder":  # computed outside of the region that reads it
        return False
    held = input_value(node)
    if is_number(node) or is_parameter(held) or (held is not None and id(held) in module_tensors()):
        return True
    return any(u.op == "call_method" and str(u.target).endswith("_") and u.args[0] is node for u in node.users)


def is_projected(node: fx.Node) -> bool:
    """Whether a projection of features reads the node."""
    return next(_readers(node), None) is not None


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    for user in node.users:
        if user.op == "call_function" and user.target in _PROJECTIONS and user.args and user.args[0] is node:
            yield user
        if (user.op == "call_method" and user.target in _TRANSPARENT) or is_move(user):
            yield from _readers(user)
