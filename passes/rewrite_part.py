"""Rewrite a part: writes the operator in the place of operations that were recognised, and removes them."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch.fx.proxy import GraphAppendingTracer

from llcompile.passes import dynamo
from llcompile.passes.emit import infer_values, weight_inputs
from llcompile.passes.lower import OperatorCall, Sequences, call_operator
from llcompile.passes.session import Session, Site
from llcompile.passes.structure.axes import Atom, Axis
from llcompile.passes.structure.found import Found
from llcompile.passes.structure.lift import lifted_function
from llcompile.passes.structure.lifted import Lifted, Source
from llcompile.passes.structure.program import Value
from llcompile.passes.structure.tail import Tail

_CALL = OperatorCall(own_state=False, single=False, wants_state=False)


def write_part(session: Session, site: Site, inputs: dict[tuple[int, str], fx.Node]) -> None:
    """Writes one mixer, with the denominators that share its level weights."""
    assert site.found is not None
    tensors = weight_inputs(session, site, inputs)
    for found in (*site.denominators, site.found):
        _write(session, site, found, tensors)


def _write(session: Session, site: Site, found: Found, tensors: list[fx.Node]) -> None:
    graph, anchor = site.region.graph, found.anchor
    before = set(graph.nodes)
    tracer = GraphAppendingTracer(graph)
    as_proxy = lambda node: fx.Proxy(node, tracer)  # noqa: E731
    # A result that was written piece by piece is whole after the last piece.
    written = found.output.node is None
    with graph.inserting_before(anchor.next if written else anchor):
        values = {source: _as_operand(graph, source, as_proxy) for source in found.reading.rows}
        _guard(site, found, values)
        size = _sizes(found, values)
        mixer = found.reading.mixer(values, size)
        weights = _weights(session, site, found, mixer.value, [as_proxy(node) for node in tensors], as_proxy)
        output, _ = call_operator(mixer, weights, _CALL, _sequences(site, as_proxy))
        result = found.reading.finish(output, values, size)
        if found.part.result.dtype != _dtype(found):
            result = result.to(found.part.result.dtype)
        if found.tail is not None:
            result = _with_tail(graph, found.tail, result, as_proxy)
        result = _laid_out(result, _example(found, anchor))
    new = [node for node in graph.nodes if node not in before]
    infer_values(new, anchor)
    site.written.extend(new)
    _put(site, found, result.node, set(new))
    _remove(graph, found)


def _guard(site: Site, found: Found, values: Mapping[Source, Any]) -> None:
    """A check in the graph of what the proof could not know: the range of a decay that is a parameter."""
    if found.reading.assumed and found.reading.decay is not None:
        decay = values[found.reading.decay]
        inside = torch.logical_and(decay > 0, decay <= 1).all()
        torch._assert_async(inside, f"{site.module or 'the model'}: its decay must lie in (0, 1] (see the report)")


def _sequences(site: Site, as_proxy: Callable[[fx.Node], fx.Proxy]) -> Sequences | None:
    if site.mask is None:
        return None
    mask = as_proxy(site.mask)
    return Sequences(attention_mask=mask.eq(0) if site.mask_inverted else mask)


def _example(found: Found, anchor: fx.Node) -> Any:
    """The result as the graph had it."""
    readers = (node for (_, node), value in found.program.reads.items() if value is found.output)
    return (found.output.node or next(readers, anchor)).meta.get("example_value")


def _laid_out(result: Any, example: Any) -> Any:
    """The result in the memory layout that it had, because code after it may take a view that needs it."""
    if not isinstance(example, torch.Tensor):
        return result
    if example.is_contiguous():
        return result.contiguous()
    order = dynamo.dims_by_stride(example)
    if order is None:
        return result
    back = [order.index(dim) for dim in range(len(order))]
    return result.permute(order).contiguous().permute(back)


def _dtype(found: Found) -> torch.dtype | None:
    """The dtype of the operator's output, where it is known to be the result's."""
    source = found.reading.value
    return source.dtype if isinstance(source, Value) and not found.reading.post else None


def _as_operand(graph: fx.Graph, source: Source, as_proxy: Callable[[fx.Node], fx.Proxy]) -> fx.Proxy:
    if isinstance(source, Value):
        assert source.node is not None
        return as_proxy(source.node)
    function, bases = lifted_function(source)
    return as_proxy(graph.call_function(function, tuple(base.node for base in bases)))


def _with_tail(graph: fx.Graph, tail: Tail, joined: fx.Proxy, as_proxy: Callable[[fx.Node], fx.Proxy]) -> fx.Proxy:
    """What the code does with each piece of the mixer's output, done to all of them."""
    function, bases = lifted_function(tail.root, tail.assembled)
    nodes = (joined.node if base is tail.joined else base.node for base in bases)
    return as_proxy(graph.call_function(function, tuple(nodes)))


def _sizes(found: Found, values: Mapping[Source, fx.Proxy]) -> Callable[[Atom], Any]:
    """The size of an axis: a number, or where it is symbolic in this graph, read off an operand."""
    symbolic: dict[int, Any] = {}
    for source, rows in found.reading.rows.items():
        if isinstance(source, Lifted) or source.node is None:
            continue
        shape = source.node.meta["example_value"].shape
        for dim, (row, size) in enumerate(zip(rows, shape, strict=True)):
            if isinstance(size, torch.SymInt) and len(row) == 1:
                symbolic.setdefault(id(row[0]), values[source].size(dim))
    return lambda atom: symbolic.get(id(atom), atom.size)


def _weights(
    session: Session,
    site: Site,
    found: Found,
    value: Any,
    tensors: list[fx.Proxy],
    as_proxy: Callable[[fx.Node], fx.Proxy],
) -> Any:
    """w [B, T, H, L]; None for the linear operator."""
    weights = site.level_weights
    if weights is None:
        return None
    source = site.source if weights.in_features is not None else None
    like = value if source is None else _batch_first(found, source, as_proxy(source))
    dtype = found.part.result.dtype if source is None else source.meta["example_value"].dtype
    made = session.settings.function(weights, dtype)(like, *tensors)  # [B, T, H, L]
    missing = _count(found.times.leaves) - _count(found.times.shorter)
    if source is None or not missing or not found.is_shorter(source):
        return made
    return torch.nn.functional.pad(made, (0, 0, 0, 0, 0, missing), value=1.0)  # positions that are cut off again


def _count(axis: Axis) -> int:
    return math.prod(leaf.size for leaf in axis)


def _batch_first(found: Found, node: fx.Node, x: fx.Proxy) -> Any:
    """The projected tensor as [B, T, D]."""
    axes = found.batch_first(node)
    assert axes is not None
    if axes == (-1, 0):
        return x.unsqueeze(0)
    return x if axes == (0, 1) else x.transpose(0, 1)


def _put(site: Site, found: Found, result: fx.Node, new: set[fx.Node]) -> None:
    """Has every node that read the part's result read the new one."""
    own = {op.node for op in found.ops}
    position = {node: i for i, node in enumerate(site.region.graph.nodes)}
    for (user, node), value in found.program.reads.items():
        reads = value is found.output and user in position and user not in new
        if reads and position[user] > position[result] and not (user in own and _writes(user, node)):
            user.replace_input_with(node, result)


def _writes(user: fx.Node, node: fx.Node) -> bool:
    """Whether a node changes another in place."""
    if not user.args or user.args[0] is not node:
        return False
    if user.target is operator.setitem:
        return True
    return user.op == "call_method" and str(user.target).endswith("_") and not str(user.target).endswith("__")


def _remove(graph: fx.Graph, found: Found) -> None:
    """Erases the nodes of the part that nothing reads any more, with their writes into tensors of the part."""
    _erase_unread(graph)
    ops = set(found.ops)
    # Nodes that compute the same have one operation between them.
    own = {op.node for op in ops} | {node for node, value in found.program.results.items() if value.op in ops}
    writes: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if node in own and node.args and isinstance(node.args[0], fx.Node) and _writes(node, node.args[0]):
            writes.setdefault(_root(node.args[0]), []).append(node)
    written = {node for group in writes.values() for node in group}
    live: set[fx.Node] = set()
    pending = [node for node in graph.nodes if node not in own]
    while pending:
        node = pending.pop()
        if node in live:
            continue
        live.add(node)
        pending.extend(n for n in node.all_input_nodes if n in own)
        pending.extend(writes.get(_root(node), ()) if node in own and node not in written else ())
    for node in reversed(list(graph.nodes)):
        if node in own and node not in live and not node.users:
            graph.erase_node(node)
    _sweep(graph)


def _erase_unread(graph: fx.Graph) -> None:
    """Erases tensors that the code computes and never reads: they would keep the part alive that they read."""
    for node in reversed(list(graph.nodes)):
        pure = node.op in ("call_function", "call_method") and not node.is_impure()
        written = pure and bool(node.args) and isinstance(node.args[0], fx.Node) and _writes(node, node.args[0])
        if pure and not written and not node.users and _is_tensor(node):
            graph.erase_node(node)


def _sweep(graph: fx.Graph) -> None:
    """Erases what only the removed operations read: masks, sizes, views of operands."""
    for node in reversed(list(graph.nodes)):
        pure = node.op in ("call_function", "call_method") and not node.is_impure() and not _is_bracket(node)
        written = pure and bool(node.args) and isinstance(node.args[0], fx.Node) and _writes(node, node.args[0])
        if pure and not node.users and not written:
            graph.erase_node(node)
    _erase_empty_brackets(graph)


# What Dynamo writes around the operations of a vmap.
_OPENS, _CLOSES, _LOADS = "_vmap_increment_nesting", "_vmap_decrement_nesting", "lazy_load_decompositions"


def _is_bracket(node: fx.Node) -> bool:
    return _name(node) in (_OPENS, _CLOSES, _LOADS)


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", ""))


def _erase_empty_brackets(graph: fx.Graph) -> None:
    """Erases each vmap that no operation is left of."""
    opened: list[fx.Node] = []
    for node in list(graph.nodes):
        if _name(node) == _OPENS:
            opened.append(node)
        elif _name(node) == _CLOSES and opened:
            start = opened.pop()
            if start.next is node:
                graph.erase_node(node)
                graph.erase_node(start)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("example_value"), torch.Tensor)


def _root(node: fx.Node) -> fx.Node:
    """The tensor that a view shows."""
    views = {operator.getitem, "view", "transpose", "permute", "unsqueeze", "squeeze", "select", "narrow", "mT", "T"}
    while node.target in views and node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node
