"""Multi-head latent attention: keys and values are widened from one narrow projection of the input."""

from __future__ import annotations

from torch import fx

from llcompile.patterns.mechanisms.facts import Facts
from llcompile.torch_internals import reach
from llcompile.torch_internals.places import module_of

# A latent is found at most this many nodes above the keys: norms, splits, views and rotations lie between.
_REACH = 40


def declares_latent(node: fx.Node) -> bool:
    """Whether the module itself names the rank of its latent: after a graph break the projections are out of sight."""
    key, _ = module_of(node.meta)
    owner = reach.find_module(key) if key else None
    return isinstance(getattr(owner, "kv_lora_rank", None), int)


def shares_latent(facts: Facts, key: fx.Node, value: fx.Node) -> bool:
    """Whether keys and values are widened from one narrow projection of the input."""
    widened = _first_linear(facts, value)
    if widened is None:
        return False
    source = widened.args[0]
    if not isinstance(source, fx.Node) or not _widens(facts, widened):
        return False
    of_key = [n for n in _above(facts, key) if facts.names[n] == "linear"]
    shared = widened in of_key or any(n.args[0] is source and _widens(facts, n) for n in of_key)
    return shared and _is_projected_through_norm(facts, source)


def _widens(facts: Facts, linear: fx.Node) -> bool:
    out, into = facts.shapes.get(linear.args[1], (0, 0))  # type: ignore[arg-type]
    return out > into


def _is_projected_through_norm(facts: Facts, node: fx.Node) -> bool:
    """Whether the first projection above the node narrows, and comes before any residual sum of two activations."""
    first = _first_linear(facts, node)
    if first is None or _widens(facts, first):
        return False
    below = set(_below(facts, first))
    return not any(_is_residual(facts, n) for n in _above(facts, node) if n in below)


def _is_residual(facts: Facts, node: fx.Node) -> bool:
    return facts.names[node] == "add" and len(facts.activations.intersection(facts.inputs[node])) == 2


def _first_linear(facts: Facts, node: fx.Node) -> fx.Node | None:
    return next((n for n in _above(facts, node) if facts.names[n] == "linear"), None)


def _above(facts: Facts, node: fx.Node) -> list[fx.Node]:
    return list(facts.above(node, lambda n: False, _REACH))


def _below(facts: Facts, node: fx.Node) -> list[fx.Node]:
    return list(facts.below(node, lambda n: False, _REACH))
