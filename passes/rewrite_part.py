"""Rewrite a part: writes the operator in the place of operations that were recognised, and removes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.fx.proxy import GraphAppendingTracer

from llcompile.passes.candidate import Candidate, GraphCandidate
from llcompile.passes.dead import erase_dead, live
from llcompile.passes.emit import infer_values, weight_inputs
from llcompile.passes.place import Place, copy_behind
from llcompile.passes.place import place as placed
from llcompile.passes.session import Session
from llcompile.patterns.graph.effects import Effects
from llcompile.patterns.known.lower import OperatorCall, Sequences, call_operator
from llcompile.patterns.mixer import Mixer
from llcompile.patterns.structure.axes import Axis, Dim
from llcompile.patterns.structure.found import Found
from llcompile.patterns.structure.lift import lifted_function
from llcompile.patterns.structure.lifted import Lifted, LiveIn, sample_of
from llcompile.patterns.structure.program import Value
from llcompile.patterns.structure.tail import Tail
from llcompile.torch_internals.sizes import dims_by_stride

_CALL = OperatorCall(own_state=False, single=False, wants_state=False)


def write_part(session: Session, candidate: GraphCandidate, inputs: dict[tuple[int, str], fx.Node]) -> None:
    """Writes one mixer, with the denominators that share its level weights."""
    tensors = weight_inputs(session, candidate, inputs)
    for found in candidate.group:
        _write(session, candidate, found, tensors)


def _write(session: Session, candidate: Candidate, found: Found, tensors: list[fx.Node]) -> None:
    graph, effects = candidate.region.graph, candidate.region.effects
    lived, before = live(graph, effects), set(graph.nodes)
    reads = [node for node in (_weighed(candidate), candidate.mask) if node is not None]
    place = placed(graph, effects, found, reads, trains=torch.is_grad_enabled())
    tracer = GraphAppendingTracer(graph)
    copies = {node: copy_behind(node) for node in place.copied}

    def as_proxy(node: fx.Node) -> fx.Proxy:
        node = place.reads.get(node, node)
        return fx.Proxy(copies.get(node, node), tracer)

    with graph.inserting_before(place.anchor.next):
        values = {live_in: _as_operand(graph, live_in, as_proxy) for live_in in found.hypothesis.layouts}
        _guard(candidate, found, values)
        size = _sizes(found, values)
        mixer = found.hypothesis.mixer(values, size)
        mixer = _as_precise(found, mixer)
        weights = _weights(session, candidate, found, mixer.value, [as_proxy(node) for node in tensors], as_proxy)
        output, _ = call_operator(mixer, weights, _CALL, _sequences(candidate, as_proxy))
        result = found.hypothesis.finish(output, values, size)
        if found.subgraph.result.dtype != _dtype(found):
            result = result.to(found.subgraph.result.dtype)
        if found.tail is not None:
            result = _with_tail(graph, found.tail, result, as_proxy)
        result = _laid_out(result, place.result.meta.get("example_value"))
        # The operator keeps what it returns for its backward.
        result = result.clone() if place.written else result
    new = [node for node in graph.nodes if node not in before]
    infer_values(new, place.anchor)
    effects.add(new)
    candidate.written.extend(new)
    _put(graph, effects, place, result.node)
    found.program.results[result.node] = found.output  # parts behind it read it there
    erase_dead(graph, effects, lived)


def _guard(candidate: Candidate, found: Found, values: Mapping[LiveIn, Any]) -> None:
    """A check in the graph of what the proof could not know: the range of a decay that is a parameter."""
    if found.hypothesis.assumed and found.hypothesis.decay is not None:
        decay = values[found.hypothesis.decay]
        inside = torch.logical_and(decay > 0, decay <= 1).all()
        torch._assert_async(inside, f"{candidate.module or 'the model'}: its decay must lie in (0, 1] (see the report)")


def _sequences(candidate: Candidate, as_proxy: Callable[[fx.Node], fx.Proxy]) -> Sequences | None:
    if candidate.mask is None:
        return None
    mask = as_proxy(candidate.mask)
    return Sequences(attention_mask=mask.eq(0) if candidate.mask_inverted else mask)


def _laid_out(result: Any, example: Any) -> Any:
    """The result in the memory layout that it had, because code after it may take a view that needs it."""
    if not isinstance(example, torch.Tensor):
        return result
    if example.is_contiguous():
        return result.contiguous()
    order = dims_by_stride(example)
    if order is None:
        return result
    back = [order.index(position) for position in range(len(order))]
    return result.permute(order).contiguous().permute(back)


def _dtype(found: Found) -> torch.dtype | None:
    """The dtype of the operator's output, where it is known to be the result's."""
    live_in = found.hypothesis.value
    return live_in.dtype if isinstance(live_in, Value) and not found.hypothesis.post else None


def _as_precise(found: Found, mixer: Mixer) -> Mixer:
    """The mixer in the result's precision, where the code widens what it reads and the result is not narrowed again."""
    operands = (found.hypothesis.query, found.hypothesis.key, found.hypothesis.value)
    given = {sample_of(live_in).dtype for live_in in operands if live_in is not None}
    wide = found.subgraph.result.dtype
    read = [v for user in found.output.users for v in user.outputs if user.name == "_to_copy"]
    narrowed = len(read) == len(found.output.users) > 0 and {v.dtype for v in read} <= given
    if wide.itemsize <= min(dtype.itemsize for dtype in given) or (narrowed and len(given) == 1):
        return mixer
    return replace(mixer, query=mixer.query.to(wide), key=mixer.key.to(wide), value=mixer.value.to(wide))


def _as_operand(graph: fx.Graph, live_in: LiveIn, as_proxy: Callable[[fx.Node], fx.Proxy]) -> fx.Proxy:
    if isinstance(live_in, Value):
        assert live_in.node is not None
        return as_proxy(live_in.node)
    function, bases = lifted_function(live_in)
    return as_proxy(graph.call_function(function, tuple(_node(base, as_proxy) for base in bases)))


def _node(value: Value, as_proxy: Callable[[fx.Node], fx.Proxy]) -> fx.Node:
    assert value.node is not None
    return as_proxy(value.node).node


def _with_tail(graph: fx.Graph, tail: Tail, joined: fx.Proxy, as_proxy: Callable[[fx.Node], fx.Proxy]) -> fx.Proxy:
    """What the code does with each piece of the mixer's output, done to all of them."""
    function, bases = lifted_function(tail.root, tail.assembled)
    nodes = (joined.node if base is tail.joined else _node(base, as_proxy) for base in bases)
    return as_proxy(graph.call_function(function, tuple(nodes)))


def _sizes(found: Found, values: Mapping[LiveIn, fx.Proxy]) -> Callable[[Dim], Any]:
    """The size of an axis: a number, or where it is symbolic in this graph, read off an operand."""
    symbolic: dict[int, Any] = {}
    for live_in, axes in found.hypothesis.layouts.items():
        if isinstance(live_in, Lifted) or live_in.node is None:
            continue
        shape = live_in.node.meta["example_value"].shape
        for position, (axis, size) in enumerate(zip(axes, shape, strict=True)):
            if isinstance(size, torch.SymInt) and len(axis) == 1:
                symbolic.setdefault(id(axis[0]), values[live_in].size(position))
    return lambda dim: symbolic.get(id(dim), dim.size)


def _weights(
    session: Session,
    candidate: Candidate,
    found: Found,
    value: Any,
    tensors: list[fx.Proxy],
    as_proxy: Callable[[fx.Node], fx.Proxy],
) -> Any:
    """w [B, T, H, L]; None for the linear operator."""
    weights = candidate.level_weights
    if weights is None:
        return None
    live_in = _weighed(candidate)
    if live_in is None:
        like = value
    else:
        like = _batch_first(found, live_in, as_proxy(live_in)) if candidate.owner_input is None else as_proxy(live_in)
    dtype = found.subgraph.result.dtype if live_in is None else live_in.meta["example_value"].dtype
    made = session.settings.function(weights, dtype)(like, *tensors)  # [B, T, H, L]
    if weights.heads == 1 < found.sizes[0]:
        made = made.expand(-1, -1, found.sizes[0], -1)
    missing = _count(found.analysis.leaves) - _count(found.analysis.shorter)
    if live_in is None or not missing or (candidate.owner_input is None and not found.is_shorter(live_in)):
        return made
    return torch.nn.functional.pad(made, (0, 0, 0, 0, 0, missing), value=1.0)  # positions that are cut off again


def _weighed(candidate: Candidate) -> fx.Node | None:
    """The node that the level weights are computed from; None where they read nothing."""
    weights = candidate.level_weights
    return None if weights is None or weights.in_features is None else candidate.weight_input


def _count(axis: Axis) -> int:
    return math.prod(leaf.size for leaf in axis)


def _batch_first(found: Found, node: fx.Node, x: fx.Proxy) -> Any:
    """The projected tensor as [B, T, D]."""
    axes = found.batch_first(node)
    assert axes is not None
    if axes == (-1, 0):
        return x.unsqueeze(0)
    return x if axes == (0, 1) else x.transpose(0, 1)


def _put(graph: fx.Graph, effects: Effects, place: Place, result: fx.Node) -> None:
    """Has every node behind the part read the new result in the place of the old one."""
    nodes = list(graph.nodes)
    behind = set(nodes[nodes.index(result) + 1 :])
    for carrier in place.carriers:
        for user in [user for user in carrier.users if user in behind]:
            user.replace_input_with(carrier, result)
    old, new = effects.shows(place.result), effects.new()
    effects.rename(behind, old, new)
    effects.place(result, new, like=place.result)
