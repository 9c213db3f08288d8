"""Scans that are no loops: calls of libraries, trees of products, sums of what the decays were taken out of."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import permutations

from llcompile.patterns.mechanisms.facts import Facts, node_of
from llcompile.patterns.mechanisms.found import Found
from llcompile.patterns.mechanisms.recurrences import (
    FIXED,
    GATED,
    NONLINEAR,
    SELECTIVE_SCAN,
    STATE_SPACE,
    WHOLE_LOOP,
    contracts,
    is_outer,
    is_sum,
    serves_one,
)
from llcompile.patterns.mechanisms.vocabulary import EXPONENTIALS, MOVES
from llcompile.patterns.structure.program import Value

# Calls that are a whole recurrence, by a part of their name.
_CALLS = {"selective_scan": SELECTIVE_SCAN, "_cudnn_rnn": NONLINEAR, "mkldnn_rnn_layer": NONLINEAR}
_CALLS |= dict.fromkeys(("_lstm_mps", "miopen_rnn"), NONLINEAR)
_CALLS["while_loop"] = WHOLE_LOOP  # recording unrolls what it can; this is the rest
_SCALED = {"mul", "div"}
# A tree has fewer values than this below any of its products.
_TREE = 4000

# A sum that two steps make one, and the decay and state of the later one.
Composition = tuple[Value, Value, Value]


def find(facts: Facts) -> Iterator[Found]:
    """Every scan of a graph."""
    trees: dict[str, list[Composition]] = {}
    for value in facts.values:
        name = facts.names[value]
        called = next((kind for part, kind in _CALLS.items() if part in name), "")
        if called and value.index == 0:
            yield Found(node_of(value), called, frozenset((value,)))
        if value not in facts.activations:
            continue
        kind = _accumulated(facts, value)
        if kind:
            yield Found(node_of(value), kind, frozenset((value,)))
        parts = _composed(facts, value) if name == "add" else None
        if parts is not None:
            stack = node_of(value).meta.get("nn_module_stack") or {}
            trees.setdefault(next(reversed(stack), ""), []).append((value, *parts))
    for compositions in trees.values():
        yield from _tree(facts, compositions)


def _tree(facts: Facts, compositions: list[Composition]) -> Iterator[Found]:
    """Products of pairs (decay, state) at several places of the same sequence."""
    value, decay, state = compositions[0]
    kind = _kind(facts, _origin(facts, decay), _origin(facts, state), compositions[-1][0])
    if kind:
        products = (v for _, a, _ in compositions for v in facts.users(a) if facts.names[v] == "mul")
        yield Found(node_of(value), kind, frozenset((*products, *(v for v, _, _ in compositions))))


def _composed(facts: Facts, value: Value) -> tuple[Value, Value] | None:
    """`a` and `u` of the later pair, if the value is `a * u' + u` and `a * a'` is computed, too: two steps as one."""
    products = [v for v in facts.inputs(value) if facts.names[v] == "mul" and len(facts.inputs(v)) == 2]
    for product in products:
        later = [v for v in facts.inputs(value) if v is not product]
        for decay, earlier in permutations(facts.inputs(product)):
            others = {u for u in facts.users(decay) if u is not product and facts.names[u] == "mul"}
            same = {_origin(facts, v) for u in others for v in facts.inputs(u) if v is not decay}
            if later and decay is not earlier and _origin(facts, decay) in same:
                return decay, later[0]
    return None


def _origin(facts: Facts, value: Value) -> Value:
    """The tensor that the value is a part of."""
    while facts.names[value] in MOVES and facts.inputs(value):
        value = max(facts.inputs(value), key=facts.size)
    return value


def _accumulated(facts: Facts, value: Value) -> str:
    """`h = exp(c) * cumsum(u * exp(-c))`, where `c` is a sum of log decays, or the same with logarithms all through."""
    if facts.names[value] == "logcumsumexp":
        readers = facts.below(value, partial(is_sum, facts))
        return "" if any(contracts(facts, v) for v in readers) else GATED
    if facts.names[value] != "cumsum" or facts.names[facts.inputs(value)[0]] not in _SCALED:
        return ""
    scaled = facts.inputs(value)[0]
    undone = [v for u in facts.users(value) if facts.names[u] in _SCALED for v in facts.inputs(u) if v is not value]
    before = [v for v in facts.inputs(scaled) if facts.names[v] in EXPONENTIALS]
    if not before or not any(facts.names[v] in EXPONENTIALS for v in undone):
        return ""
    return _kind(facts, before[0], scaled, value)


def _kind(facts: Facts, decay: Value, state: Value, last: Value) -> str:
    readers = facts.below(last, partial(is_sum, facts), _TREE)
    if not any(contracts(facts, v) for v in readers):
        return GATED if decay in facts.activations else FIXED
    if not serves_one(facts, decay, state.shape) or not is_outer(facts, state):
        return ""  # one decay for a row of the state is linear attention; no products, its denominator
    return SELECTIVE_SCAN if decay in facts.activations else STATE_SPACE
