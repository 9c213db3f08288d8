"""Identify: names the other mechanisms in the graph, which are left alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import fx

from llcompile.passes import dynamo
from llcompile.passes.discover import module_of
from llcompile.passes.records import Untouched
from llcompile.passes.session import Session

_FUSED_ATTENTION = {F.scaled_dot_product_attention, torch._C._nn.scaled_dot_product_attention}
_SOFTMAX = {F.softmax, torch.softmax, "softmax"}
_PRODUCTS = {torch.matmul, torch.bmm, torch.einsum, "matmul", "bmm"}
_LINEAR = {F.linear, torch._C._nn.linear}
# A latent is recognised at most this many nodes above the keys (norms, splits, views, rotations lie between).
_REACH = 40


def identify(session: Session) -> int:
    """Fills `session.untouched`; returns how many mechanisms were named."""
    names: dict[str, str] = {}
    for node in (node for region in session.regions for node in region.graph.nodes):
        key_value = _attended(node)
        if key_value is not None:
            key, name = module_of(node.meta)
            latent = _shares_latent(*key_value) or _declares_latent(key)
            kind = "multi-head latent attention (MLA)" if latent else "softmax attention"
            names.setdefault(session.name(key, name), kind)
    session.untouched = [Untouched(module, kind) for module, kind in names.items()]
    return len(names)


def _attended(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The keys and values of softmax attention, if the node is one: the fused call, or softmax between two products."""
    if node.target in _FUSED_ATTENTION:
        key, value = (node.args[i] if len(node.args) > i else node.kwargs.get(n) for i, n in ((1, "key"), (2, "value")))
        return (key, value) if isinstance(key, fx.Node) and isinstance(value, fx.Node) else None
    if node.target not in _SOFTMAX:
        return None
    scores = next((n for n in _above(node) if n.target in _PRODUCTS), None)
    mixed = next((n for n in _below(node) if n.target in _PRODUCTS), None)
    if scores is None or mixed is None or len(scores.all_input_nodes) < 2 or len(mixed.all_input_nodes) < 2:
        return None
    return scores.all_input_nodes[1], mixed.all_input_nodes[1]


def _declares_latent(key: str) -> bool:
    """Whether the module itself names the rank of its latent: after a graph break the projections are out of sight."""
    owner = dynamo.find_module(key) if key else None
    return isinstance(getattr(owner, "kv_lora_rank", None), int)


def _shares_latent(key: fx.Node, value: fx.Node) -> bool:
    """Whether keys and values are widened from one narrow projection of the input: latent attention."""
    widened = _first_linear(value)
    if widened is None or widened not in set(_above(key)):
        return False
    source, weight = widened.args[0], widened.args[1]
    narrows = isinstance(weight, fx.Node) and _out_features(weight) > _in_features(weight)
    return narrows and isinstance(source, fx.Node) and _is_projected_through_norm(source)


def _is_projected_through_norm(node: fx.Node) -> bool:
    """Whether the first projection above the node comes before any residual sum of two activations."""
    first = _first_linear(node)
    if first is None:
        return False
    between = [n for n in _above(node) if n in set(_below(first))]
    return not any(_is_residual(n) for n in between)


def _is_residual(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", node.target) in ("add", "iadd") and len(node.all_input_nodes) == 2


def _first_linear(node: fx.Node) -> fx.Node | None:
    return next((n for n in _above(node) if n.target in _LINEAR), None)


def _out_features(weight: fx.Node) -> int:
    return int(weight.meta["example_value"].shape[0])


def _in_features(weight: fx.Node) -> int:
    return int(weight.meta["example_value"].shape[-1])


def _above(node: fx.Node) -> Iterator[fx.Node]:
    yield from _walk(node, lambda n: n.all_input_nodes)


def _below(node: fx.Node) -> Iterator[fx.Node]:
    yield from _walk(node, lambda n: list(n.users))


def _walk(node: fx.Node, step) -> Iterator[fx.Node]:  # type: ignore[no-untyped-def]
    """Breadth first from the node, itself included, at most `_REACH` nodes."""
    queue, seen = [node], {node}
    while queue and len(seen) <= _REACH:
        current = queue.pop(0)
        yield current
        for other in step(current):
            if other not in seen:
                seen.add(other)
                queue.append(other)
