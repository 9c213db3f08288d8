"""How many heads an attention has, and how many groups of keys, whatever the layout of its tensors.

Scores are heads x queries x keys numbers for each sequence of the batch; how many tokens there are is read off the
projection that the queries come from.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from llcompile.patterns.mechanisms.facts import Facts
from llcompile.patterns.mechanisms.vocabulary import SPREADING
from llcompile.patterns.structure.program import Value

# Between a projection and the product: norms, rotations, caches, views.
_REACH = 96


@dataclass(frozen=True)
class Heads:
    """Numbers of heads and of groups that share keys and values; None where the graph does not tell."""

    heads: int | None = None
    groups: int | None = None

    @property
    def text(self) -> str:
        """As the report says it."""
        if self.heads is None:
            return ""
        if self.heads == 1:
            return "1 head"
        named = {None: "", 1: "MQA, ", self.heads: "MHA, "}.get(self.groups, "GQA, ")
        over = f" over {self.groups} groups" if named == "GQA, " else ""
        return f"{named}{self.heads} heads{over}"


def of_call(facts: Facts, query: Value, key: Value) -> Heads:
    """Of a call that takes [B, H, T, K]; or [B * H, T, K], or [B, T, K] of one head, told apart by how many tokens the
    queries were projected from."""
    if len(query.shape) > 3 and len(key.shape) > 3:
        return _checked(query.shape[-3], key.shape[-3] / _copies(facts, key))
    tokens = _tokens(facts, query)
    if tokens is None or len(query.shape) < 2:
        return Heads()
    heads = prod(query.shape[:-1]) / prod(tokens)
    return _checked(heads, heads / _copies(facts, key))


def of_scores(facts: Facts, scores: Value, normalised: Value, dim: int) -> Heads:
    """Of scores that are a product of queries and keys, normalised along an axis."""
    first, second = facts.factors(scores) or (scores, scores)
    keys, summed = normalised.shape[dim], facts.names[scores] == "sum"
    keys = keys if summed or keys in scores.shape[-2:] else scores.shape[-1]  # else a choice of them is normalised
    # The order of factors means nothing: keys are those that there are more of, or that were copied.
    swapped = scores.shape[-1] != keys == scores.shape[-2]
    both = [_of_counts(facts, scores, q, k, normalised, keys) for q, k in ((first, second), (second, first))]
    if swapped or None in (both[0].groups, both[1].groups):
        return both[swapped]
    return min(both, key=lambda found: found.groups or 0)


def _of_counts(facts: Facts, scores: Value, query: Value, key: Value, normalised: Value, keys: int) -> Heads:
    tokens = _tokens(facts, query)
    if tokens is None:
        given = facts.given(key)
        plain = len(normalised.shape) == len(given.shape) == 4 and facts.names[scores] == "bmm"
        return _checked(normalised.shape[1], given.shape[1] / _copies(facts, given)) if plain else Heads()
    maps, width = facts.size(scores) / (prod(tokens) * keys), 0.0
    if maps >= 1:
        width = facts.size(query) / (prod(tokens) * maps)
    if facts.names[scores] == "sum" or not width:  # broadcast factors: the key is as large as the product
        return _checked(maps, None)
    merged = len(tokens) == 1 and tokens[0] % keys == 0
    length = keys if merged or keys in tokens else tokens[-1]
    batch = prod(tokens) / length
    return _checked(maps, facts.size(key) / (batch * keys * width) / _copies(facts, key))


def _checked(heads: float, groups: float | None) -> Heads:
    """Only whole numbers that divide each other are believed."""
    if heads < 1 or heads != int(heads):
        return Heads()
    if groups is None or groups < 1 or groups != int(groups) or heads % groups:
        return Heads(int(heads))
    return Heads(int(heads), int(groups))


def _tokens(facts: Facts, value: Value) -> tuple[int, ...] | None:
    """The axes before the features of what the value was projected from."""
    projections = (v for v in facts.above(value, facts.is_projection, _REACH) if facts.is_linear(v))
    operands = next((facts.projected(v) for v in projections), None)
    return None if operands is None else facts.given(operands[0]).shape[:-1]


def _copies(facts: Facts, value: Value) -> float:
    """How often each key was copied on the way from its projection."""
    copies = 1.0
    for _ in range(_REACH):
        above = [v for v in facts.inputs(value) if v in facts.activations]
        if facts.is_projection(value) or not above:
            break
        source = max(above, key=facts.size)
        if facts.names[value] in SPREADING and facts.size(source):
            copies *= facts.size(value) / facts.size(source)
        value = source
    return copies
