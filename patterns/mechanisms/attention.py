"""Softmax attention: a product of two activations, normalised over the keys, that weighs a third one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import fx

from llcompile.patterns.mechanisms import heads, latent
from llcompile.patterns.mechanisms.facts import Facts, node_of
from llcompile.patterns.mechanisms.found import Found
from llcompile.patterns.mechanisms.heads import Heads
from llcompile.patterns.mechanisms.masks import Masks
from llcompile.patterns.mechanisms.time_mixing import weighs_positions
from llcompile.patterns.mechanisms.vocabulary import EXPONENTIALS, FUSED, SOFTMAX, called
from llcompile.patterns.structure.program import Value

# Calls of libraries that are all of it are known by a part of their name and tell nothing more.
_OPAQUE = ("flash_attn", "scaled_dot_product_flash", "scaled_dot_product_efficient")
# torch's own layers as one call, and which of its arguments is the number of heads.
_LAYERS = {
    "multi_head_attention_forward": 4,
    "_native_multi_head_attention": 4,
    "_transformer_encoder_layer_fwd": 2,
}
# What squashes scores: sum to one over the keys, or each by itself.
_SQUASHING = SOFTMAX | EXPONENTIALS | {"sigmoid"}


@dataclass(frozen=True)
class Attention:
    """The parts of one softmax attention; a call that stays whole is scores, weights and mixed in one.

    Args:
        normalised: the scores after their normalisation, which names its place.
        scores: the product of queries and keys.
        mixed: the product of weights and values.
        query, key, value: factors of the products.
        weights: the other factor: what the values are multiplied with.
    """

    normalised: Value
    scores: Value
    mixed: Value
    query: Value
    key: Value
    value: Value
    weights: Value

    @property
    def node(self) -> fx.Node:
        """The graph's node that normalises."""
        return node_of(self.normalised)


def find(facts: Facts) -> Iterator[Found]:
    """Every softmax attention of a graph."""
    masks = Masks(facts)
    seen: set[Value] = set()
    for value in facts.values:
        name = facts.names[value]
        if any(part in name for part in _OPAQUE):
            if value.index == 0:
                yield Found(node_of(value), "softmax attention", frozenset((value,)))
        elif name in _LAYERS and value.index == 0:
            yield _layer(facts, masks, value)
        elif name in FUSED or (name in _SQUASHING and value in facts.activations):
            attention = _called(facts, value) if name in FUSED else _spelled(facts, value)
            if attention is not None and attention.scores not in seen:
                seen.add(attention.scores)
                yield _named(facts, masks, attention)


def _layer(facts: Facts, masks: Masks, value: Value) -> Found:
    node = node_of(value)
    number = node.args[_LAYERS[facts.names[value]]]
    counted = Heads(number, number) if isinstance(number, int) else Heads()
    text = _with("softmax attention", counted.text, *masks.of_layer(node))
    return Found(node, text, frozenset((value,)), counted.heads, counted.groups)


def _called(facts: Facts, value: Value) -> Attention | None:
    """One call that is all of it."""
    operands = _operands(facts, node_of(value))
    if value.index or len(operands) < 3:
        return None
    query, key, weighed = operands
    return Attention(value, value, value, query, key, weighed, value)


def _operands(facts: Facts, node: fx.Node) -> list[Value]:
    """Query, key and value of a call."""
    given = (facts.argument(node, i, name) for i, name in enumerate(("query", "key", "value")))
    return [value for value in given if isinstance(value, Value)]


def _spelled(facts: Facts, value: Value) -> Attention | None:
    """Two products with a normalisation between them."""
    name, below = facts.names[value], list(facts.below(value, facts.ends))
    scores = next((v for v in facts.above(value, facts.ends) if v is not value and facts.factors(v)), None)
    mixed = next((v for v in below if v is not value and v is not scores and facts.factors(v)), None)
    if scores is None or mixed is None:
        return None
    if name == "sigmoid" and facts.size(value) != facts.size(scores):
        return None
    if name in EXPONENTIALS and not _sums_to_one(facts, value, scores, below):
        return None
    query, key = facts.factors(scores) or (scores, scores)
    first, second = facts.factors(mixed) or (mixed, mixed)
    weights, weighed = (first, second) if first in below else (second, first)
    return None if weights is weighed else Attention(value, scores, mixed, query, key, weighed, weights)


def _sums_to_one(facts: Facts, value: Value, scores: Value, below: list[Value]) -> bool:
    """Whether an exponential of scores is divided by its own sum: after it, or by the logarithm of it before."""
    if any(facts.names[v] == "logsumexp" for v in facts.above(value, lambda v: v is scores)):
        return True
    return any(facts.names[v] in ("sum", "cumsum") for v in below) and any(
        facts.names[v] in ("div", "reciprocal") for v in facts.below(value, facts.is_projection)
    )


def _named(facts: Facts, masks: Masks, attention: Attention) -> Found:
    kind = next((kind for kind, holds in KINDS if holds(facts, attention)), "softmax attention")
    counted = _heads(facts, attention)
    if kind == LATENT:  # its heads share a latent, not keys
        counted = Heads(counted.heads)
    said = "" if kind == LATENT else counted.text
    text = _with(kind, said, *masks.seen_by(attention.node, attention.scores, attention.weights))
    inside = frozenset((attention.normalised, attention.scores, attention.mixed))
    return Found(attention.node, text, inside, counted.heads, counted.groups)


def _heads(facts: Facts, attention: Attention) -> Heads:
    operands = _operands(facts, attention.node) if called(attention.node) in FUSED else []
    if len(operands) == 3:
        return heads.of_call(facts, *operands[:2])
    normalised = attention.normalised
    dim = normalised.op.args[1] if normalised.op is not None and facts.names[normalised] in SOFTMAX else -1
    return heads.of_scores(facts, attention.scores, normalised, dim)


def _with(kind: str, *said: str) -> str:
    """The name and what else there is to say, in one pair of brackets."""
    name, bracket, inner = kind.partition(" (")
    parts = [part for part in (inner.rstrip(")") if bracket else "", *said) if part]
    return f"{name} ({', '.join(parts)})" if parts else name


LATENT = "multi-head latent attention (MLA)"


def _is_latent(facts: Facts, attention: Attention) -> bool:
    return latent.shares_latent(facts, attention.key, attention.value) or latent.declares_latent(attention.node)


def _is_differential(facts: Facts, attention: Attention) -> bool:
    """The difference of two softmax maps, before or after they meet the values."""
    between = facts.below(attention.normalised, facts.ends)
    after = facts.below(attention.mixed, facts.ends, 48)
    return any(_subtracts_maps(facts, v, 1) for v in between) or any(_subtracts_maps(facts, v, 2) for v in after)


def _subtracts_maps(facts: Facts, value: Value, products: int) -> bool:
    """Whether both sides of a difference come from softmax maps, with so many products on the way at most."""
    sides = facts.inputs(value) if facts.names[value] in ("sub", "rsub") else []
    return len(sides) == 2 and all(_reaches_softmax(facts, side, products) for side in sides)


def _reaches_softmax(facts: Facts, value: Value, products: int) -> bool:
    for v in facts.above(value, facts.ends, 48):
        if facts.names[v] in SOFTMAX:
            return any(facts.factors(above) for above in facts.above(v, facts.ends) if above is not v)
        if facts.names[v] in FUSED:
            return True
        factors = facts.factors(v) if products > 1 else None
        if factors and any(_reaches_softmax(facts, factor, products - 1) for factor in factors):
            return True
    return False


def _is_sparse(facts: Facts, attention: Attention) -> bool:
    """The largest scores, or the keys that an indexer chose, and no others."""
    roots = (attention.normalised, attention.key)
    return any(facts.names[v] in ("topk", "kthvalue") for root in roots for v in facts.above(root, facts.ends))


def _is_low_rank(facts: Facts, attention: Attention) -> bool:
    """The keys are mixtures of all positions."""
    return any(weighs_positions(facts, v) for v in facts.above(attention.key, facts.ends))


# What an attention may be besides plain; the first that holds names it.
KINDS: tuple[tuple[str, Callable[[Facts, Attention], bool]], ...] = (
    # Each score is squashed by itself.
    ("sigmoid attention", lambda facts, attention: facts.names[attention.normalised] == "sigmoid"),
    # Keys and values are widened from one narrow projection.
    (LATENT, _is_latent),
    # One softmax map is subtracted from another.
    ("differential attention", _is_differential),
    # Which keys take part is decided by a top-k.
    ("sparse attention (top-k)", _is_sparse),
    # Queries meet a few learned mixtures of the keys.
    ("low-rank attention (Linformer)", _is_low_rank),
)
