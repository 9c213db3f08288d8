"""Rewrite a call: writes the operator in the place of a known function's call, or the library's own function again."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from llcompile.passes.candidate import CallCandidate
from llcompile.passes.emit import kept, level_weights, padding_mask, routing, weight_inputs, writing
from llcompile.passes.placing import is_changed
from llcompile.passes.session import Session
from llcompile.patterns.graph.regions import Region
from llcompile.patterns.known import KnownFunction
from llcompile.patterns.known.capture import positions_of
from llcompile.patterns.known.lower import lower_call, lower_weighed
from llcompile.patterns.known.operator_call import OperatorCall, Sequences
from llcompile.patterns.mixer import Mixer


def restore(candidate: CallCandidate) -> None:
    """A declined call: the library's function itself, which the inner compiler traces through."""
    graph = candidate.region.graph
    with graph.inserting_before(candidate.node):
        original = graph.call_function(plain_call(candidate), (), dict(candidate.node.kwargs))
    original.meta = dict(candidate.node.meta)
    candidate.region.effects.place(original, candidate.region.effects.shows(candidate.node), like=candidate.node)
    candidate.node.replace_all_uses_with(original)
    graph.erase_node(candidate.node)


def plain_call(candidate: CallCandidate) -> Callable[..., Any]:
    """The library's function of a captured call."""
    captured, proved = candidate.captured, candidate.certificate is not None
    positions = positions_of(candidate.node.target)  # type: ignore[arg-type]

    def original(**arguments: Any) -> Any:
        try:
            return captured.run(arguments, positions)
        except Exception:
            # A kernel for another device (the example run of a CUDA-only library on a CPU), or one that is not
            # installed and that packed sequences need: the operator is the same.
            if not (proved and (captured.entry.opaque or candidate.packed)):
                raise
            return lower_call(captured.entry, captured.plain, arguments, levels=None)

    original.__name__ = original.__qualname__ = captured.function.__name__
    original.__module__ = __name__
    return original


def write_call(session: Session, candidate: CallCandidate, inputs: dict[tuple[int, str], fx.Node]) -> None:
    """Writes one mixer."""
    node, call, entry = candidate.node, candidate.call, candidate.captured.entry
    tensors = weight_inputs(session, candidate, inputs)
    saved = _saved(candidate) if torch.is_grad_enabled() else frozenset()
    (value,) = candidate.values()
    with writing(candidate, node, like=node) as as_proxy:
        copies = {x: node.graph.call_method("clone", (x,)) for x in saved}
        given = fx.map_arg(dict(node.kwargs), lambda x: as_proxy(copies.get(x, x)))  # type: ignore[arg-type,return-value]
        values = {**call.values, **given}  # type: ignore[dict-item]
        read = kept(candidate)

        def weigh(mixer: Mixer, how: OperatorCall, sequences: Sequences | None) -> tuple[Any, Any]:
            route = routing(candidate, mixer, how, sequences)
            weights = level_weights(
                session,
                candidate,
                tensors,
                lambda x: as_proxy(read.get(x, x)),
                lambda: _by_token(entry, as_proxy(value), value.meta["example_value"].dim()),
                value.meta["example_value"].dtype,
                route,
            )
            if weights is not None and not candidate.has_time:
                weights = weights.squeeze(1)
            return weights, None if route is None else route.final

        result = lower_weighed(entry, call.with_values(values), call, weigh, padding_mask(candidate, as_proxy))
    _replace(candidate.region, node, result)


def _by_token(entry: KnownFunction, value: fx.Proxy, rank: int) -> fx.Proxy:
    """The values as [B, T, ...]."""
    time = entry.time_axis(rank)
    return value.unsqueeze(1) if time is None else value.transpose(1, time)


def _saved(candidate: CallCandidate) -> frozenset[fx.Node]:
    """The operands that are changed in place after the call, which the operator's backward still needs."""
    state = candidate.node.kwargs.get(candidate.captured.entry.writes_state or "")
    read = (node for node in candidate.node.all_input_nodes if node is not state)
    return frozenset(node for node in read if is_changed(candidate.region.effects, node, after=candidate.node))


def _replace(region: Region, node: fx.Node, result: Any) -> None:
    """Puts `result` (a proxy, or a tuple of proxies and None) in the node's place and erases the node."""
    graph, effects = region.graph, region.effects
    replaced = [(node, result)]
    if isinstance(result, tuple):
        for user in node.users:
            assert user.target is operator.getitem, f"{user.format_node()} reads a tuple whole"
        replaced = [(user, result[user.args[1]]) for user in node.users]  # type: ignore[index]
    for old, new in replaced:
        if new is not None:
            effects.place(new.node, effects.shows(old), like=old)
            old.replace_all_uses_with(new.node)
        if old is not node:
            graph.erase_node(old)
    graph.erase_node(node)


def original(session: Session) -> fx.GraphModule:
    """The model's own code as a graph of its own, so that the session's graph can be rewritten and looked at."""
    copies: dict[int, fx.GraphModule] = {}
    for region in reversed(session.regions):  # bodies come after the graphs that call them
        copies[id(region.module)] = _copied(session, region, copies)
    return copies[id(session.module)]


def _copied(session: Session, region: Region, copies: dict[int, fx.GraphModule]) -> fx.GraphModule:
    graph = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(region.graph, nodes)
    graph.output(result)
    for candidate in session.candidates:
        if isinstance(candidate, CallCandidate) and candidate.region is region:
            nodes[candidate.node].target = plain_call(candidate)
    module = fx.GraphModule(region.module, graph)
    for node in graph.find_nodes(op="get_attr"):
        body = copies.get(id(getattr(region.module, str(node.target), None)))
        if body is not None:
            setattr(module, str(node.target), body)
    return module
