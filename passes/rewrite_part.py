"""Rewrite a part: writes the operator in the place of operations that were recognised, and removes them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from llcompile.passes.candidate import Candidate, GraphCandidate
from llcompile.passes.dead import erase_dead, live
from llcompile.passes.emit import AsProxy, level_weights, padding_mask, routing, sets, weighed, weight_inputs, writing
from llcompile.passes.placing import Place, copy_behind, operand_nodes
from llcompile.passes.placing import place as placed
from llcompile.passes.session import Session
from llcompile.patterns.graph.effects import Effects
from llcompile.patterns.known.lower import call_operator
from llcompile.patterns.known.operator_call import OperatorCall, Sequences
from llcompile.patterns.mixer import Mixer
from llcompile.patterns.structure.axes import Axis, Dim
from llcompile.patterns.structure.found import Found
from llcompile.patterns.structure.lift import lifted_function
from llcompile.patterns.structure.lifted import Lifted, LiveIn, sample_of
from llcompile.patterns.structure.program import Row, Value
from llcompile.patterns.structure.tail import Tail
from llcompile.torch_internals.sizes import dims_by_stride


def write_part(session: Session, candidate: GraphCandidate, inputs: dict[tuple[int, str], fx.Node]) -> None:
    """Writes one mixer, with the denominators that share its level weights."""
    tensors = weight_inputs(session, candidate, inputs)
    for found, inside in candidate.placed:
        _write(session, candidate, found, inside, tensors)


def _write(
    session: Session, candidate: GraphCandidate, found: Found, inside: tuple[Found, ...], tensors: list[fx.Node]
) -> None:
    """Writes one part in its place, with those that only its own tail reads."""
    graph, effects = candidate.region.graph, candidate.region.effects
    lived = live(graph, effects)
    reads = [node for node in (weighed(candidate), candidate.mask) if node is not None]
    reads += [node for part in inside for node in operand_nodes(part)]
    place = placed(graph, effects, found, reads, trains=torch.is_grad_enabled())
    with writing(candidate, place.anchor.next, like=place.anchor) as proxy_of:
        copies = {node: copy_behind(node) for node in place.copied}

        def as_proxy(node: fx.Node) -> fx.Proxy:
            node = place.reads.get(node, node)
            return proxy_of(copies.get(node, node))

        compute = functools.partial(_computed, session, candidate, tensors=tensors, as_proxy=as_proxy)
        results = {part.output: compute(part) for part in (*inside, found)}
        result = results[found.output]
        if found.tail is not None:
            rows = {**results, found.tail.joined: result}
            result = _with_tail(graph, found.tail, lambda value: _read(value, as_proxy, rows))
        result = _laid_out(result, place.result.meta.get("example_value"))
        # The operator keeps what it returns for its backward.
        result = result.clone() if place.written else result
    _put(graph, effects, place, result.node)
    found.program.results[result.node] = found.output  # parts behind it read it there
    erase_dead(graph, effects, lived)


def _computed(
    session: Session, candidate: GraphCandidate, found: Found, tensors: list[fx.Node], as_proxy: AsProxy
) -> fx.Proxy:
    """What a part computes, before its tail."""
    values = {live_in: _as_operand(candidate.region.graph, live_in, as_proxy) for live_in in found.hypothesis.layouts}
    _guard(candidate, found, values)
    size = _sizes(found, values)
    mixer = _as_precise(found, found.hypothesis.mixer(values, size))
    mask = padding_mask(candidate, as_proxy)
    sequences = None if mask is None else Sequences(attention_mask=mask)
    weights = _weights(session, candidate, found, mixer, sequences, tensors, as_proxy)
    output, _ = call_operator(mixer, weights, OperatorCall(), sequences)
    result = found.hypothesis.finish(output, values, size)
    if found.subgraph.result.dtype != _dtype(found):
        result = result.to(found.subgraph.result.dtype)
    # A divisor without a gradient.
    return result.detach() if found.subgraph.is_detached else result


def _guard(candidate: Candidate, found: Found, values: Mapping[LiveIn, Any]) -> None:
    """A check in the graph of what the proof could not know: the range of a decay that is a parameter."""
    if found.hypothesis.assumed and found.hypothesis.decay is not None:
        decay = values[found.hypothesis.decay]
        inside = torch.logical_and(decay > 0, decay <= 1).all()
        torch._assert_async(inside, f"{candidate.module or 'the model'}: its decay must lie in (0, 1] (see the report)")


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
    names = ("query", "key", "value", "erase_query", "erase_key")
    present = {name: getattr(mixer, name) for name in names if getattr(mixer, name) is not None}
    return replace(mixer, **{name: operand.to(wide) for name, operand in present.items()})


def _as_operand(graph: fx.Graph, live_in: LiveIn, as_proxy: AsProxy) -> fx.Proxy:
    if isinstance(live_in, Value):
        return _read(live_in, as_proxy)
    function, bases = lifted_function(live_in)
    return as_proxy(graph.call_function(function, tuple(_read(base, as_proxy).node for base in bases)))


def _read(value: Value, as_proxy: AsProxy, rows: Mapping[Value, fx.Proxy] | None = None) -> fx.Proxy:
    """A value in the graph: one that was computed here, the pieces of a loop put together, or that of its node."""
    if rows is not None and value in rows:
        return rows[value]
    if isinstance(value, Row) and value.op is not None:
        join: Callable[..., Any] = torch.stack if value.op.name == "stack" else torch.cat
        joined: fx.Proxy = join([as_proxy(_node(piece)) for piece in value.op.inputs], value.op.args[1])
        return joined
    return as_proxy(_node(value))


def _node(value: Value) -> fx.Node:
    assert value.node is not None  # `placing` has seen to it
    return value.node


def _with_tail(graph: fx.Graph, tail: Tail, read: Callable[[Value], fx.Proxy]) -> fx.Proxy:
    """What the code does with each piece of the mixer's output, done to all of them."""
    function, bases = lifted_function(tail.root, tail.assembled)
    nodes = [read(base) for base in bases]
    return fx.Proxy(graph.call_function(function, tuple(proxy.node for proxy in nodes)), nodes[0].tracer)


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
    candidate: GraphCandidate,
    found: Found,
    mixer: Mixer,
    sequences: Sequences | None,
    tensors: list[fx.Node],
    as_proxy: Callable[[fx.Node], fx.Proxy],
) -> Any:
    """The weights [B, T, H, L] for all heads that share them, and for positions that are cut off again."""
    read, missing = weighed(candidate), _count(found.analysis.leaves) - _count(found.analysis.shorter)
    shorter = read is not None and missing and (candidate.owner_input is not None or found.is_shorter(read))
    if shorter and sequences is not None:
        sequences = Sequences(attention_mask=sequences.attention_mask[:, :-missing])
    route = routing(candidate, mixer, OperatorCall(), sequences)
    like, dtype = lambda: mixer.value, found.subgraph.result.dtype
    weights = level_weights(session, candidate, tensors, as_proxy, like, dtype, route)
    if weights is not None and sets(candidate) == 1 < found.sizes[0]:
        weights = weights.expand(-1, -1, found.sizes[0], -1)
    return torch.nn.functional.pad(weights, (0, 0, 0, 0, 0, missing), value=1.0) if shorter else weights


def _count(axis: Axis) -> int:
    return math.prod(leaf.size for leaf in axis)


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
