"""Rewrite: writes the operator into the graph in the place of each proved call; a declined call runs its own code."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.proxy import GraphAppendingTracer

from llcompile.passes.emit import infer_values, owner_input, weight_inputs
from llcompile.passes.one_token import batch_size, weigh
from llcompile.passes.place import copy_behind, is_changed
from llcompile.passes.rewrite_part import write_part
from llcompile.passes.session import Session
from llcompile.passes.site import CallSite, Site, TokenSite, WrittenSite
from llcompile.patterns.graph.regions import Region
from llcompile.patterns.known.lower import lower, lower_call


def rewrite(session: Session) -> int:
    """Replaces every captured call; returns how many were rewritten as our operator."""
    inputs: dict[tuple[int, str], fx.Node] = {}
    for site in session.sites:
        if site.open and site.owner_input is not None:
            site.source = owner_input(session, site)
        if site.open:
            _WRITERS[type(site)](session, site, inputs)
        elif isinstance(site, CallSite):
            _restore(site.region.graph, site)
    return sum(site.open for site in session.sites)


def _restore(graph: fx.Graph, site: CallSite) -> None:
    """A declined call: the library's function itself, which the inner compiler traces through."""
    with graph.inserting_before(site.node):
        original = graph.call_function(plain_call(site), (), dict(site.node.kwargs))
    original.meta = dict(site.node.meta)
    site.region.effects.place(original, site.region.effects.shows(site.node), like=site.node)
    site.node.replace_all_uses_with(original)
    graph.erase_node(site.node)


def plain_call(site: CallSite) -> Callable[..., Any]:
    """The library's function of a captured call."""
    leaf, proved = site.leaf, site.certificate is not None

    def original(**arguments: Any) -> Any:
        try:
            return leaf.function(**arguments)
        except Exception:
            # A kernel for another device (the example run of a CUDA-only library on a CPU), or one that is not
            # installed and that packed sequences need: the operator is the same.
            if not (proved and (leaf.row.opaque or site.packed)):
                raise
            return lower_call(leaf.row, leaf.plain, arguments, levels=None)

    original.__name__ = original.__qualname__ = leaf.function.__name__
    original.__module__ = __name__
    return original


def _write_operator(session: Session, site: CallSite, inputs: dict[tuple[int, str], fx.Node]) -> None:
    graph = site.region.graph
    tensors = weight_inputs(session, site, inputs)
    before = set(graph.nodes)
    tracer = GraphAppendingTracer(graph)
    saved = _saved(site) if torch.is_grad_enabled() else frozenset()
    with graph.inserting_before(site.node):
        as_proxy = lambda node: fx.Proxy(node, tracer)  # noqa: E731
        copies = {node: graph.call_method("clone", (node,)) for node in saved}
        given = fx.map_arg(dict(site.node.kwargs), lambda node: as_proxy(copies.get(node, node)))  # type: ignore[arg-type,return-value]
        values = {**site.call.values, **given}  # type: ignore[dict-item]
        weights = _write_weights(session, site, [as_proxy(node) for node in tensors], as_proxy)
        mask = None if site.mask is None else as_proxy(site.mask)
        mask = mask.eq(0) if site.mask_inverted and mask is not None else mask
        result = lower(site.leaf.row, site.call.with_values(values), site.call, weights, mask)
    new = [node for node in graph.nodes if node not in before]
    infer_values(new, site.node)
    site.written.extend(new)
    site.region.effects.add(new)
    _replace(site.region, site.node, result)


def _write_token(session: Session, site: TokenSite, inputs: dict[tuple[int, str], fx.Node]) -> None:
    """Weighs what a mixer gives for one token."""
    graph, effects = site.region.graph, site.region.effects
    tensors = weight_inputs(session, site, inputs)
    if site.level_weights is None:
        return
    tracer = GraphAppendingTracer(graph)
    as_proxy = lambda node: fx.Proxy(node, tracer)  # noqa: E731
    source = site.source if site.level_weights.in_features is not None else None
    axes = None if source is None else site.token.batch_first(source)
    source = None if source is None else _kept(site, source)
    for part in site.token.parts:
        before, output = set(graph.nodes), part.output
        with graph.inserting_before(output.next):
            if source is None:
                x = as_proxy(output).new_zeros((batch_size(part, as_proxy(output)), 1, 1))
            else:
                x = as_proxy(source)
            if source is not None and site.owner_input is None and axes != (0, 1):
                x = x.unsqueeze(0) if axes == (-1, 0) else x.transpose(0, 1)
            dtype = (source or output).meta["example_value"].dtype
            weights = session.settings.function(site.level_weights, dtype)(x, *map(as_proxy, tensors))
            result = weigh(part, as_proxy(output), weights)
        new = [node for node in graph.nodes if node not in before]
        infer_values(new, output)
        effects.add(new)
        site.written.extend(new)
        for user in [user for user in output.users if user not in new]:
            user.replace_input_with(output, result.node)
        nodes = list(graph.nodes)
        old, fresh = effects.shows(output), effects.new()
        effects.rename(nodes[nodes.index(result.node) + 1 :], old, fresh)
        effects.place(result.node, fresh, like=output)


def _saved(site: CallSite) -> frozenset[fx.Node]:
    """The operands that are changed in place after the call, which the operator's backward still needs."""
    state = site.node.kwargs.get(site.leaf.row.writes_state or "")
    read = (node for node in site.node.all_input_nodes if node is not state)
    return frozenset(node for node in read if is_changed(site.region.effects, node, after=site.node))


def _write_weights(
    session: Session, site: CallSite, tensors: list[fx.Proxy], as_proxy: Callable[[fx.Node], fx.Proxy]
) -> Any:
    """w [B, T, H, L], or [B, H, L] for a step; None for the linear operator."""
    if site.level_weights is None:
        return None
    has_time = "T" in site.call.sizes
    value = site.node.kwargs[site.leaf.row.tensor_with("V").name]
    assert isinstance(value, fx.Node)
    like = as_proxy(value) if has_time else as_proxy(value).unsqueeze(1)
    source = site.source if site.level_weights.in_features is not None else None
    source = None if source is None else _kept(site, source)
    dtype = (source or value).meta["example_value"].dtype
    function = session.settings.function(site.level_weights, dtype)
    weights = function(like if source is None else as_proxy(source), *tensors)
    return weights if has_time else weights.squeeze(1)


def _kept(site: Site, source: fx.Node) -> fx.Node:
    """What the level weights read as it is when it is computed, whatever is written to it later."""
    if not is_changed(site.region.effects, source, after=source):
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
_WRITERS: dict[type[Site], _Writer] = {CallSite: _write_operator, WrittenSite: write_part, TokenSite: _write_token}
