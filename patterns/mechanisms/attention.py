"""Softmax attention: a product of two activations, normalised over the keys, that weighs a third one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from torch import fx

from llcompile.patterns.mechanisms import latent
from llcompile.patterns.mechanisms.axes import TimeAxes
from llcompile.patterns.mechanisms.facts import Facts
from llcompile.patterns.mechanisms.found import Found
from llcompile.patterns.mechanisms.heads import Heads, heads_of
from llcompile.patterns.mechanisms.masks import Masks
from llcompile.patterns.mechanisms.vocabulary import EXPONENTIALS, PROJECTIONS, SIGMOIDS, SOFTMAX

# Calls that are all of it. Opaque ones of libraries are known by a part of their name and tell nothing more.
_FUSED = {"scaled_dot_product_attention", "flex_attention"}
_OPAQUE = ("flash_attn", "scaled_dot_product_flash", "scaled_dot_product_efficient")
# torch's own layers as one call, and which of its arguments is the number of heads.
_LAYERS = {"multi_head_attention_forward": 4, "native_multi_head_attention": 4, "transformer_encoder_layer_fwd": 2}


@dataclass(frozen=True)
class Attention:
    """The parts of one softmax attention.

    Args:
        node: what names its place: the fused call, or the normalisation.
        scores: the product of queries and keys (the fused call itself, where there is one).
        mixed: the product with the values (same).
        query, key, value: its operands.
        weights: what the values are multiplied with (same).
    """

    node: fx.Node
    scores: fx.Node
    mixed: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    weights: fx.Node

    @property
    def fused(self) -> bool:
        """Whether one call is all of it."""
        return self.scores is self.node


def find(facts: Facts, axes: TimeAxes) -> Iterator[Found]:
    """Every softmax attention of a graph."""
    masks = Masks(facts)
    seen: set[fx.Node] = set()
    for node in facts.nodes:
        if any(part in facts.names[node] for part in _OPAQUE):
            yield Found(node, "softmax attention")
            continue
        if facts.names[node] in _LAYERS:
            yield _layer(masks, node, _LAYERS[facts.names[node]])
            continue
        attention = _fused(facts, node) or _spelled(facts, node)
        if attention is not None and attention.scores not in seen:
            seen.add(attention.scores)
            yield _named(facts, axes, masks, attention)


def _layer(masks: Masks, node: fx.Node, position: int) -> Found:
    heads = node.args[position]
    counted = Heads(heads, heads) if isinstance(heads, int) else Heads()
    seen = masks.of_call(node.kwargs.get("attn_mask"), bool(node.kwargs.get("is_causal")))
    text = _with("softmax attention", *(s for s in (counted.text, *seen) if s))
    return Found(node, text, counted.heads, counted.groups, frozenset((node,)))


def _fused(facts: Facts, node: fx.Node) -> Attention | None:
    if facts.names[node] not in _FUSED:
        return None
    given = [
        node.args[i] if len(node.args) > i else node.kwargs.get(n) for i, n in enumerate(("query", "key", "value"))
    ]
    query, key, value = (n if isinstance(n, fx.Node) else None for n in given)
    if query is None or key is None or value is None:
        return None
    return Attention(node, node, node, query, key, value, weights=node)


def _spelled(facts: Facts, node: fx.Node) -> Attention | None:
    """Two products with a normalisation between them."""
    name = facts.names[node]
    if node not in facts.activations or name not in SOFTMAX | EXPONENTIALS | SIGMOIDS:
        return None
    stop = partial(_ends, facts)
    scores = next((n for n in facts.above(node, stop) if n is not node and facts.factors(n)), None)
    if scores is None:
        return None
    below = list(facts.below(node, stop))
    mixed = next((n for n in below if n is not node and n is not scores and facts.factors(n)), None)
    if mixed is None:
        return None
    if name in SIGMOIDS and facts.shapes[node] != facts.shapes[scores]:
        return None
    if name in EXPONENTIALS and not _sums_to_one(facts, node, scores, below):
        return None
    query, key = facts.factors(scores) or (scores, scores)
    weights, value = _weights_first(facts, node, mixed)
    if value is weights:
        return None
    return Attention(node, scores, mixed, query, key, value, weights)


def _ends(facts: Facts, node: fx.Node) -> bool:
    """Where a mechanism's inside ends: a projection, or a product of two activations."""
    return facts.names[node] in PROJECTIONS or facts.factors(node) is not None


def _sums_to_one(facts: Facts, node: fx.Node, scores: fx.Node, below: list[fx.Node]) -> bool:
    """Whether an exponential of scores is divided by its own sum: after it, or by the logarithm of it before."""
    if any(facts.names[n] == "logsumexp" for n in facts.above(node, lambda n: n is scores)):
        return True
    return any(facts.names[n] in ("sum", "cumsum") for n in below) and any(
        facts.names[n] in ("div", "reciprocal") for n in facts.below(node, lambda n: facts.names[n] in PROJECTIONS)
    )


def _weights_first(facts: Facts, node: fx.Node, mixed: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The factors of the second product: what comes from the normalisation, and the value."""
    first, second = facts.factors(mixed) or (mixed, mixed)
    reached = set(facts.below(node, partial(_ends, facts)))
    return (first, second) if first in reached else (second, first)


def _named(facts: Facts, axes: TimeAxes, masks: Masks, attention: Attention) -> Found:
    kind = next((kind for kind, holds in KINDS if holds(facts, axes, attention)), "softmax attention")
    heads = heads_of(facts, attention.node, attention.scores, attention.query, attention.key)
    if kind == LATENT:  # its heads share a latent, not keys
        heads = Heads(heads.heads)
    seen = masks.seen_by(attention.node, attention.scores, attention.weights)
    said = "" if kind == LATENT else heads.text
    text = _with(kind, *(s for s in (said, *seen) if s))
    return Found(attention.node, text, heads.heads, heads.groups, _inside(attention))


def _with(kind: str, *said: str) -> str:
    """The name and what else there is to say, in one pair of brackets."""
    name, bracket, inner = kind.partition(" (")
    parts = [inner.rstrip(")"), *said] if bracket else list(said)
    return f"{name} ({', '.join(parts)})" if parts else name


def _inside(attention: Attention) -> frozenset[fx.Node]:
    return frozenset((attention.node, attention.scores, attention.mixed))


LATENT = "multi-head latent attention (MLA)"


def _is_latent(facts: Facts, axes: TimeAxes, attention: Attention) -> bool:
    return latent.shares_latent(facts, attention.key, attention.value) or latent.declares_latent(attention.node)


def _is_differential(facts: Facts, axes: TimeAxes, attention: Attention) -> bool:
    """The difference of two softmax maps, before or after they meet the values."""
    if attention.fused:
        fused = attention.node
        after = facts.below(fused, lambda n: facts.names[n] in PROJECTIONS, 24)
        return any(facts.names[n] == "sub" and _comes_from_attention(facts, n) for n in after)
    weights = facts.below(attention.node, partial(_ends, facts))
    between = (n for n in weights if facts.names[n] == "sub")
    after = facts.below(attention.mixed, partial(_ends, facts), 16)
    late = (n for n in after if facts.names[n] == "sub" and n is not attention.mixed)
    return any(_subtracts_maps(facts, n, 1) for n in between) or any(_subtracts_maps(facts, n, 2) for n in late)


def _subtracts_maps(facts: Facts, node: fx.Node, products: int) -> bool:
    """Whether both sides of a difference come from softmax maps, with so many products on the way at most."""
    sides = [n for n in node.args if isinstance(n, fx.Node)]
    return len(sides) == 2 and all(_reaches_softmax(facts, side, products) for side in sides)


def _reaches_softmax(facts: Facts, node: fx.Node, products: int) -> bool:
    for n in facts.above(node, partial(_ends, facts), 24):
        if facts.names[n] in SOFTMAX:
            return _over_scores(facts, n)
        factors = facts.factors(n) if products > 1 else None
        if factors and any(_reaches_softmax(facts, f, products - 1) for f in factors):
            return True
    return False


def _over_scores(facts: Facts, node: fx.Node) -> bool:
    return any(facts.factors(n) for n in facts.above(node, partial(_ends, facts)) if n is not node)


def _comes_from_attention(facts: Facts, node: fx.Node) -> bool:
    sides = [n for n in node.args if isinstance(n, fx.Node)]
    return len(sides) == 2 and all(
        any(facts.names[n] in _FUSED for n in facts.above(side, lambda n: facts.names[n] in PROJECTIONS | _FUSED, 24))
        for side in sides
    )


def _is_sparse(facts: Facts, axes: TimeAxes, attention: Attention) -> bool:
    """The largest scores, or the keys that an indexer chose, and no others."""
    stop = partial(_ends, facts)
    roots = [attention.node, attention.key]
    return any(facts.names[n] in ("topk", "kthvalue") for root in roots for n in facts.above(root, stop))


def _is_low_rank(facts: Facts, axes: TimeAxes, attention: Attention) -> bool:
    """The keys are mixtures of all positions."""
    mixed = set(axes.mixed)
    return any(n in mixed for n in facts.above(attention.key, partial(_ends, facts)))


# What an attention may be besides plain; the first that holds names it.
KINDS: tuple[tuple[str, Callable[[Facts, TimeAxes, Attention], bool]], ...] = (
    # Each score is squashed by itself.
    ("sigmoid attention", lambda facts, axes, attention: facts.names[attention.node] in SIGMOIDS),
    # Keys and values are widened from one narrow projection.
    (LATENT, _is_latent),
    # One softmax map is subtracted from another.
    ("differential attention", _is_differential),
    # Which keys take part is decided by a top-k.
    ("sparse attention (top-k)", _is_sparse),
    # Queries meet a few learned mixtures of the keys.
    ("low-rank attention (Linformer)", _is_low_rank),
)
