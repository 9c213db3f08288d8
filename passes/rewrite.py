"""Rewrite: writes the operator into the graph in the place of each proved call; a declined call runs its own code."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.proxy import GraphAppendingTracer

from llcompile.passes.candidate import CallCandidate, Candidate, GraphCandidate, TokenCandidate
from llcompile.passes.emit import infer_values, owner_input, weight_inputs
from llcompile.passes.one_token import batch_size, weigh
from llcompile.passes.place import copy_behind, is_changed
from llcompile.passes.rewrite_part import write_part
from llcompile.passes.session import Session
from llcompile.patterns.graph.regions import Region
from llcompile.patterns.known.lower import lower, lower_call


def rewrite(session: Session) -> int:
    """Replaces every captured call; returns how many were rewritten as our operator."""
    inputs: dict[tuple[int, str], fx.Node] = {}
    for candidate in session.candidates:
        if candidate.open and candidate.owner_input is not None:
            candidate.weight_input = owner_input(session, candidate)
        if candidate.open:
            _WRITERS[type(candidate)](session, candidate, inputs)
        elif isinstance(candidate, CallCandidate):
            _restore(candidate.region.graph, candidate)
    return sum(candidate.open for candidate in session.candidates)


def _restore(graph: fx.Graph, candidate: CallCandidate) -> None:
    """A declined call: the library's function itself, which the inner compiler traces through."""
    with graph.inserting_before(candidate.node):
        original = graph.call_function(plain_call(candidate), (), dict(candidate.node.kwargs))
    original.meta = dict(candidate.node.meta)
    candidate.region.effects.place(original, candidate.region.effects.shows(candidate.node), like=candidate.node)
    candidate.node.replace_all_uses_with(original)
    graph.erase_node(candidate.node)


def plain_call(candidate: CallCandidate) -> Callable[..., Any]:
    """The library's function of a captured call."""
    captured, proved = candidate.captured, candidate.certificate is not None

    def original(**arguments: Any) -> Any:
        try:
            return captured.function(**arguments)
        except Exception:
            # A kernel for another device (the example run of a CUDA-only library on a CPU), or one that is not
            # installed and that packed sequences need: the operator is the same.
            if not (proved and (captured.entry.opaque or candidate.packed)):
                raise
            return lower_call(captured.entry, captured.plain, arguments, levels=None)

    original.__name__ = original.__qualname__ = captured.function.__name__
    original.__module__ = __name__
    return original


def _write_operator(session: Session, candidate: CallCandidate, inputs: dict[tuple[int, str], fx.Node]) -> None:
    graph = candidate.region.graph
    tensors = weight_inputs(session, candidate, inputs)
    before = set(graph.nodes)
    tracer = GraphAppendingTracer(graph)
    saved = _saved(candidate) if torch.is_grad_enabled() else frozenset()
    with graph.inserting_before(candidate.node):
        as_proxy = lambda node: fx.Proxy(node, tracer)  # noqa: E731
        copies = {node: graph.call_method("clone", (node,)) for node in saved}
        given = fx.map_arg(dict(candidate.node.kwargs), lambda node: as_proxy(copies.get(node, node)))  # type: ignore[arg-type,return-value]
        values = {**candidate.call.values, **given}  # type: ignore[dict-item]
        weights = _write_weights(session, candidate, [as_proxy(node) for node in tensors], as_proxy)
        mask = None if candidate.mask is None else as_proxy(candidate.mask)
        mask = mask.eq(0) if candidate.mask_inverted and mask is not None else mask
        result = lower(candidate.captured.entry, candidate.call.with_values(values), candidate.call, weights, mask)
    new = [node for node in graph.nodes if node not in before]
    infer_values(new, candidate.node)
    candidate.written.extend(new)
    candidate.region.effects.add(new)
    _replace(candidate.region, candidate.node, result)


def _write_token(session: Session, candidate: TokenCandidate, inputs: dict[tuple[int, str], fx.Node]) -> None:
    """Weighs what a mixer gives for one token."""
    graph, effects = candidate.region.graph, candidate.region.effects
    tensors = weight_inputs(session, candidate, inputs)
    if candidate.level_weights is None:
        return
    tracer = GraphAppendingTracer(graph)
    as_proxy = lambda node: fx.Proxy(node, tracer)  # noqa: E731
    source = candidate.weight_input if candidate.level_weights.in_features is not None else None
    axes = None if source is None else candidate.token.batch_first(source)
    source = None if source is None else _kept(candidate, source)
    for part in candidate.token.parts:
        before, output = set(graph.nodes), part.output
        with graph.inserting_before(output.next):
            if source is None:
                x = as_proxy(output).new_zeros((batch_size(part, as_proxy(output)), 1, 1))
            else:
                x = as_proxy(source)
            if source is not None and candidate.owner_input is None and axes != (0, 1):
                x = x.unsqueeze(0) if axes == (-1, 0) else x.transpose(0, 1)
            dtype = (source or output).meta["example_value"].dtype
            weights = session.settings.function(candidate.level_weights, dtype)(x, *map(as_proxy, tensors))
            result = weigh(part, as_proxy(output), weights)
        new = [node for node in graph.nodes if node not in before]
        infer_values(new, output)
        effects.add(new)
        candidate.written.extend(new)
        for user in [user for user in output.users if user not in new]:
            user.replace_input_with(output, result.node)
        nodes = list(graph.nodes)
        old, fresh = effects.shows(output), effects.new()
        effects.rename(nodes[nodes.index(result.node) + 1 :], old, fresh)
        effects.place(result.node, fresh, like=output)


def _saved(candidate: CallCandidate) -> frozenset[fx.Node]:
    """The operands that are changed in place after the call, which the operator's backward still needs."""
    state = candidate.node.kwargs.get(candidate.captured.entry.writes_state or "")
    read = (node for node in candidate.node.all_input_nodes if node is not state)
    return frozenset(node for node in read if is_changed(candidate.region.effects, node, after=candidate.node))


def _write_weights(
    session: Session, candidate: CallCandidate, tensors: list[fx.Proxy], as_proxy: Callable[[fx.Node], fx.Proxy]
) -> Any:
    """w [B, T, H, L], or [B, H, L] for a step; None for the linear operator."""
    if candidate.level_weights is None:
        return None
    has_time = "T" in candidate.call.sizes
    value = candidate.node.kwargs[candidate.captured.entry.tensor_with("V").name]
    assert isinstance(value, fx.Node)
    like = as_proxy(value) if has_time else as_proxy(value).unsqueeze(1)
    source = candidate.weight_input if candidate.level_weights.in_features is not None else None
    source = None if source is None else _kept(candidate, source)
    dtype = (source or value).meta["example_value"].dtype
    function = session.settings.function(candidate.level_weights, dtype)
    weights = function(like if source is None else as_proxy(source), *tensors)
    return weights if has_time else weights.squeeze(1)


def _kept(candidate: Candidate, source: fx.Node) -> fx.Node:
    """What the level weights read as it is when it is computed, whatever is written to it later."""
    if not is_changed(candidate.region.effects, source, after=source):
        return source
    copy = copy_behind(source)
    copy.meta["example_value"] = source.meta["example_value"]
    return copy


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


_Writer = Callable[[Session, Any, dict[tuple[int, str], fx.Node]], None]
_WRITERS: dict[type[Candidate], _Writer] = {
    CallCandidate: _write_operator,
    GraphCandidate: write_part,
    TokenCandidate: _write_token,
}
