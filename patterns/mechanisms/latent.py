"""Multi-head latent attention: keys and values are widened from one narrow projection of the input."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from llcompile.patterns.mechanisms.facts import Facts
from llcompile.patterns.structure.program import Value
from llcompile.torch_internals import reach
from llcompile.torch_internals.places import module_of

# A latent is found at most this many values above the keys: norms, splits, views and rotations lie between.
_REACH = 80


def declares_latent(node: fx.Node) -> bool:
    """Whether the module itself names the rank of its latent: after a graph break the projections are out of sight."""
    key, _ = module_of(node.meta)
    owner = reach.find_module(key) if key else None
    return isinstance(getattr(owner, "kv_lora_rank", None), int)


def shares_latent(facts: Facts, key: Value, value: Value) -> bool:
    """Whether keys and values are widened from one narrow projection of the input."""
    widened = next(_projections(facts, value), None)
    if widened is None or not _widens(facts, widened):
        return False
    latent = _projected(facts, widened)
    of_key = list(_projections(facts, key))
    shared = widened in of_key or any(_projected(facts, p) is latent and _widens(facts, p) for p in of_key)
    return shared and _is_projected_through_norm(facts, latent)


def _is_projected_through_norm(facts: Facts, value: Value) -> bool:
    """Whether the first projection above the value narrows, and comes before any residual sum of two activations."""
    first = next(_projections(facts, value), None)
    if first is None or _widens(facts, first):
        return False
    below = set(facts.below(first, lambda v: False, _REACH))
    return not any(_is_residual(facts, v) for v in facts.above(value, lambda v: False, _REACH) if v in below)


def _is_residual(facts: Facts, value: Value) -> bool:
    return facts.names[value] == "add" and len(facts.activations.intersection(facts.inputs(value))) == 2


def _projections(facts: Facts, value: Value) -> Iterator[Value]:
    return (v for v in facts.above(value, lambda v: False, _REACH) if facts.is_linear(v))


def _projected(facts: Facts, projection: Value) -> Value:
    operands = facts.projected(projection)
    return projection if operands is None else facts.given(operands[0])


def _widens(facts: Facts, projection: Value) -> bool:
    """Whether there are more features after it than before."""
    return facts.size(projection) > facts.size(_projected(facts, projection))
