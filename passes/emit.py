"""Emit: what every rewrite needs: the level weights, inputs for them, and values for the nodes that it adds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.fx.proxy import GraphAppendingTracer

from llcompile.errors import MissedLevelWeightsError
from llcompile.passes.candidate import Candidate
from llcompile.passes.marks import marked_tensors
from llcompile.passes.placing import copy_behind, is_changed
from llcompile.passes.session import Session
from llcompile.patterns.graph.run import run
from llcompile.patterns.known.operator_call import OperatorCall, Sequences
from llcompile.patterns.known.routing import Routing
from llcompile.patterns.mixer import Mixer
from llcompile.torch_internals import reach
from llcompile.torch_internals.inputs import fake_mode_of, hold_tensor
from llcompile.torch_internals.owner_input import HELD
from llcompile.torch_internals.places import place_of

AsProxy = Callable[[fx.Node], fx.Proxy]


def weight_inputs(session: Session, candidate: Candidate, inputs: dict[tuple[int, str], fx.Node]) -> list[fx.Node]:
    """The level weights' tensors: as the owner's call has them, else as inputs of the program, each made once.

    Inputs are handed into the candidate's region.
    """
    if candidate.level_weights is None or candidate.owner is None:
        return []
    marked = marked_tensors(session.marks, candidate.region, place_of(candidate.node)[0], candidate.attribute)
    if marked is not None:
        return list(marked)
    nodes = []
    for name, tensor in candidate.level_weights.tensors():
        key = (id(tensor), name)
        if key not in inputs:
            if session.settings.dry_run:  # nothing is attached that Dynamo could read
                inputs[key] = hold_tensor(session.module, (candidate.attribute, name), tensor)
            else:
                path = session.settings.path(candidate.owner, candidate.attribute)
                inputs[key] = _input(session, candidate.module, candidate.owner, (candidate.attribute, *path, name))
        nodes.append(candidate.region.lift(inputs[key]))
    return nodes


def _input(session: Session, name: str, owner: nn.Module, path: tuple[str, ...]) -> fx.Node:
    try:
        return reach.add_tensor_input(session.graph, owner, path)
    except LookupError as error:
        raise MissedLevelWeightsError(
            f"{name or type(owner).__name__}: its level weights cannot be read in this frame: "
            f"{error}. Compile the model as a whole, or run the call uncompiled."
        ) from error


def take_owner_input(session: Session, candidate: Candidate) -> None:
    """Has level weights that read what the owner was called with, [B, T, D], read it as an input of the program."""
    owner, tensor, name = candidate.owner, candidate.owner_input, candidate.attribute
    if owner is None or tensor is None:
        return
    if session.settings.dry_run:
        node = hold_tensor(session.module, (name, HELD), tensor)
    else:
        node = _input(session, candidate.module, owner, (name, *session.settings.path(owner, name), HELD))
    candidate.weight_input = candidate.region.lift(node)


def weighed(candidate: Candidate) -> fx.Node | None:
    """The node that the level weights are computed from; None where they read nothing."""
    weights = candidate.level_weights
    return None if weights is None or weights.in_features is None else candidate.weight_input


def kept(candidate: Candidate) -> dict[fx.Node, fx.Node]:
    """What the level weights read -> a copy of it as it is when it is computed, where it is written to later."""
    read = weighed(candidate)
    if read is None or not is_changed(candidate.region.effects, read, after=read):
        return {}
    copy = copy_behind(read)
    copy.meta["example_value"] = read.meta["example_value"]
    return {read: copy}


def level_weights(
    session: Session,
    candidate: Candidate,
    tensors: Iterable[fx.Node],
    as_proxy: AsProxy,
    like: Callable[[], Any],
    dtype: torch.dtype,
    routing: Routing | None = None,
) -> Any:
    """Writes w [B, T, W, L]; None for the linear operator.

    Args:
        session, candidate: whose.
        tensors: the level weights' (see `weight_inputs`).
        as_proxy: what a node is read as.
        like: makes a tensor [B, T, ...], for level weights that read nothing.
        dtype: its dtype.
        routing: what level weights read that read buckets (see `routing`); None where there is a single token.
    """
    if candidate.level_weights is None:
        return None
    read = weighed(candidate)
    if read is not None:
        dtype = read.meta["example_value"].dtype
    x = like() if read is None else _batch_first(candidate, read, as_proxy(read))
    given = [as_proxy(tensor) for tensor in tensors]
    if candidate.split is not None:
        x, given = candidate.split.inputs(x, given)
    readouts = () if routing is None else (routing.readouts,)
    return session.settings.function(candidate.level_weights, sets(candidate), dtype, *readouts)(x, *given)


def sets(candidate: Candidate) -> int:
    """How many sets of level weights the graph sees: those of this process's heads, where it has no others."""
    weights, split = candidate.level_weights, candidate.split
    return int(weights.heads if split is not None and split.inside else weights.own_heads)


def routing(candidate: Candidate, mixer: Mixer, call: OperatorCall, sequences: Sequences | None) -> Routing | None:
    """What level weights that read buckets read in one call of a mixer; None for those of other kinds."""
    sizes = None if candidate.level_weights is None else candidate.level_weights.sizes
    if sizes is None or not sizes.features:
        return None
    assert candidate.shape is not None
    return Routing(mixer, call, sequences, candidate.shape, sets(candidate), sizes.features)


def _batch_first(candidate: Candidate, node: fx.Node, x: fx.Proxy) -> fx.Proxy:
    """What the level weights read as [B, T, D]."""
    axes = (0, 1) if candidate.owner_input is not None else candidate.batch_first(node)
    assert axes is not None, f"{node.format_node()} is no sequence"
    if axes == (-1, 0):
        return x.unsqueeze(0)
    return x if axes == (0, 1) else x.transpose(0, 1)


def padding_mask(candidate: Candidate, as_proxy: AsProxy) -> fx.Proxy | None:
    """The mask [B, T] that is non-zero at tokens that are no padding; None where there is none."""
    if candidate.mask is None:
        return None
    return as_proxy(candidate.mask).eq(0) if candidate.mask_inverted else as_proxy(candidate.mask)


@contextmanager
def writing(candidate: Candidate, before: fx.Node, like: fx.Node) -> Iterator[AsProxy]:
    """Nodes that are made inside are the candidate's; yields what makes a proxy of a node, which writes further ones.

    Args:
        candidate: whose.
        before: where they go.
        like: the node whose module and line they get.
    """
    graph = candidate.region.graph
    given, tracer = set(graph.nodes), GraphAppendingTracer(graph)
    with graph.inserting_before(before):
        yield lambda node: fx.Proxy(node, tracer)
    new = [node for node in graph.nodes if node not in given]
    _infer_values(new, like)
    candidate.region.effects.add(new)
    candidate.written.extend(new)


def _infer_values(nodes: list[fx.Node], template: fx.Node) -> None:
    """Gives new nodes what Dynamo gives its own: a fake value, the module and the line that they stand for."""
    mode = fake_mode_of(template.graph)
    for node in nodes:
        for key in ("nn_module_stack", "stack_trace", "source_fn_stack"):
            if key in template.meta:
                node.meta[key] = template.meta[key]
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["example_value"])  # type: ignore[misc]
        with mode:
            node.meta["example_value"] = run(node, args, kwargs)
