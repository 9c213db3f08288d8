"""Rewrite: writes the operator into the graph in the place of each proved call; a declined call runs its own code."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import fx
from torch.fx.proxy import GraphAppendingTracer

from llcompile.passes import dynamo
from llcompile.passes.lower import lower, lower_call
from llcompile.passes.session import Session, Site


def rewrite(session: Session) -> int:
    """Replaces every captured call; returns how many were rewritten as our operator."""
    inputs: dict[tuple[int, str], fx.Node] = {}
    for site in session.sites:
        if site.open:
            _write_operator(session, site, inputs)
        else:
            _restore(site.region.graph, site)
    return sum(site.open for site in session.sites)


def _restore(graph: fx.Graph, site: Site) -> None:
    """A declined call: the library's function itself, which the inner compiler traces through."""
    with graph.inserting_before(site.node):
        original = graph.call_function(_plain_call(site), (), dict(site.node.kwargs))
    original.meta = dict(site.node.meta)
    site.node.replace_all_uses_with(original)
    graph.erase_node(site.node)


def _plain_call(site: Site) -> Callable[..., Any]:
    leaf, proved = site.leaf, site.certificate is not None

    def original(**arguments: Any) -> Any:
        try:
            return leaf.function(**arguments)
        except Exception:
            # A kernel for another device (the example run of a CUDA-only library on a CPU): the operator is the same.
            if not (leaf.row.opaque and proved):
                raise
            return lower_call(leaf.row, leaf.plain, arguments, levels=None)

    original.__name__ = original.__qualname__ = leaf.function.__name__
    original.__module__ = __name__
    return original


def _write_operator(session: Session, site: Site, inputs: dict[tuple[int, str], fx.Node]) -> None:
    assert site.call is not None
    graph = site.region.graph
    tensors = _weight_inputs(site, inputs)
    before = set(graph.nodes)
    tracer = GraphAppendingTracer(graph)
    with graph.inserting_before(site.node):
        as_proxy = lambda node: fx.Proxy(node, tracer)  # noqa: E731
        values = {**site.call.values, **fx.map_arg(dict(site.node.kwargs), as_proxy)}  # type: ignore[arg-type,dict-item]
        weights = _write_weights(session, site, [as_proxy(node) for node in tensors], as_proxy)
        result = lower(site.leaf.row, site.call.with_values(values), site.call, weights)
    new = [node for node in graph.nodes if node not in before]
    _infer_values(new, site)
    _replace(graph, site.node, result)


def _weight_inputs(site: Site, inputs: dict[tuple[int, str], fx.Node]) -> list[fx.Node]:
    """The level weights' tensors as inputs of the program, each made once, handed into the site's region."""
    if site.level_weights is None or site.owner is None:
        return []
    nodes = []
    for name, tensor in site.level_weights.tensors():
        key = (id(tensor), name)
        if key not in inputs:
            inputs[key] = dynamo.add_tensor_input(site.region.root.graph, site.owner, (site.attribute, name))
        nodes.append(site.region.lift(inputs[key]))
    return nodes


def _write_weights(
    session: Session, site: Site, tensors: list[fx.Proxy], as_proxy: Callable[[fx.Node], fx.Proxy]
) -> Any:
    """w [B, T, H, L], or [B, H, L] for a step; None for the linear operator."""
    if site.level_weights is None:
        return None
    assert site.call is not None
    has_time = "T" in site.call.sizes
    value = site.node.kwargs[site.leaf.row.tensor_with("V").name]
    assert isinstance(value, fx.Node)
    like = as_proxy(value) if has_time else as_proxy(value).unsqueeze(1)
    source = site.source if site.level_weights.in_features is not None else None
    dtype = (source or value).meta["example_value"].dtype
    function = session.settings.function(site.level_weights, dtype)
    weights = function(like if source is None else as_proxy(source), *tensors)
    return weights if has_time else weights.squeeze(1)


def _infer_values(nodes: list[fx.Node], site: Site) -> None:
    """Gives new nodes what Dynamo gives its own: a fake value, the module and the line that they stand for."""
    mode = dynamo.fake_mode_of(site.node.graph)
    for node in nodes:
        for key in ("nn_module_stack", "stack_trace", "source_fn_stack"):
            if key in site.node.meta:
                node.meta[key] = site.node.meta[key]
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["example_value"])  # type: ignore[misc]
        with mode:
            if node.op == "call_method":
                node.meta["example_value"] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                node.meta["example_value"] = node.target(*args, **kwargs)  # type: ignore[operator]


def _replace(graph: fx.Graph, node: fx.Node, result: Any) -> None:
    """Puts `result` (a proxy, or a tuple of proxies and None) in the node's place and erases the node."""
    if isinstance(result, tuple):
        for user in list(node.users):
            assert user.target is operator.getitem, f"{user.format_node()} reads a tuple whole"
            part = result[user.args[1]]  # type: ignore[index]
            if part is not None:
                user.replace_all_uses_with(part.node)
            graph.erase_node(user)
    else:
        node.replace_all_uses_with(result.node)
    graph.erase_node(node)
