"""What a recurrence is called: by what happens to the state from one step to the next, and how it is read.

Loops and scans are found elsewhere (loops.py, scans.py); both hand over a `Recurrence`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import fx

from llcompile.patterns.mechanisms.facts import Facts, Shape
from llcompile.patterns.mechanisms.vocabulary import PRODUCTS, PROJECTIONS

SELECTIVE_SCAN = "selective scan (Mamba-1)"
STATE_SPACE = "state space scan (S4)"
GATED = "gated linear recurrence (RG-LRU)"
FIXED = "linear recurrence with a fixed decay"
DENSE = "linear recurrence with a dense transition"
NONLINEAR = "non-linear recurrence (RNN)"

# One of these on the way from a state to the next one, and the recurrence is not linear.
_CURVED = {"tanh", "sigmoid", "relu", "gelu", "silu", "softplus", "softmax", "elu", "leaky_relu", "hardtanh"}
_CURVED |= {"hardsigmoid", "relu6", "mish", "logsigmoid", "exp", "sin", "cos", "erf", "pow", "square", "abs", "sign"}
_CURVED |= {"clamp", "rsqrt", "norm", "layer_norm", "rms_norm"}
_CURVED |= {"lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"}
# Calls that run a whole non-linear recurrence.
WHOLE = {"lstm", "gru", "rnn_tanh", "rnn_relu", "thnn_fused_lstm_cell", "thnn_fused_gru_cell"}
_SCALES = {"mul", "addcmul", "lerp"}


@dataclass(frozen=True)
class Recurrence:
    """One step of it.

    Args:
        state: what comes in from the step before.
        next: what goes on to the step after.
        carried: the nodes that lie on the way between, the last one included.
        reads: nodes of other steps or of the outside that hold the state, from which the way to its readers goes on.
        emitted: whether each step's state is used outside.
        outside: facts of the graph where `reads` are, if that is another one.
    """

    state: fx.Node
    next: fx.Node
    carried: frozenset[fx.Node]
    reads: tuple[fx.Node, ...]
    emitted: bool = True
    outside: Facts | None = None


def name_of(facts: Facts, step: Recurrence) -> str:
    """The usual name, or "" for what is none of these: linear attention, a running sum."""
    return next((kind for kind, holds in KINDS if holds(facts, step)), "")


def _is_nonlinear(facts: Facts, step: Recurrence) -> bool:
    ours = step.carried | {step.state}
    for node in step.carried:
        if facts.names[node] in _CURVED:
            return True
        multiplies = facts.names[node] in PRODUCTS | {"mul"}
        if multiplies and len(ours.intersection(facts.inputs[node])) > 1:
            return True
    return False


def _is_dense(facts: Facts, step: Recurrence) -> bool:
    """A learned matrix takes the state to the next one."""
    return any(
        facts.names[n] in PRODUCTS | {"linear"} and not facts.learned.isdisjoint(facts.inputs[n]) for n in step.carried
    )


def _decay(facts: Facts, step: Recurrence) -> fx.Node | None:
    """What the state is multiplied with in a step; None where that is a number or nothing."""
    ours = step.carried | {step.state}
    for node in step.carried:
        if facts.names[node] in _SCALES:
            others = [n for n in facts.inputs[node] if n not in ours and facts.size(n)]
            if others:
                return others[-1] if facts.names[node] == "lerp" else max(others, key=facts.size)
    return None


def _decays(facts: Facts, step: Recurrence) -> bool:
    return any(facts.names[n] in _SCALES for n in step.carried)


def _mixes(facts: Facts, step: Recurrence) -> bool:
    """Whether parts of the state act on each other: a matrix transition, such as the delta rule's."""
    return any(facts.names[n] in PRODUCTS | PROJECTIONS | {"sum", "cumsum", "roll"} for n in step.carried)


def _is_contracted(facts: Facts, step: Recurrence) -> bool:
    """Whether readers sum over a part of the state: it is wider than what is read."""
    known = step.outside or facts

    def ends(names: Facts) -> Callable[[fx.Node], bool]:
        return lambda n: names.names[n] in PROJECTIONS | PRODUCTS | {"sum"}

    inside = _readers(facts, (n for n in step.carried), step.carried, ends(facts))
    outside = _readers(known, step.reads, step.carried, ends(known))
    return any(contracts(facts, n) for n in inside) or any(contracts(known, n) for n in outside)


def _readers(
    facts: Facts, starts: Iterable[fx.Node], inner: frozenset[fx.Node], stop: Callable[[fx.Node], bool]
) -> Iterable[fx.Node]:
    for start in starts:
        if start in facts.position:
            yield from (n for n in facts.below(start, stop, 24) if n is not start and n not in inner)


def contracts(facts: Facts, node: fx.Node) -> bool:
    """Whether the node sums over an axis, with another activation or plainly."""
    if facts.names[node] == "sum":
        return isinstance(node.args[0], fx.Node) and facts.size(node) < facts.size(node.args[0])
    if facts.factors(node) is None:
        return False
    if facts.names[node] != "einsum":
        return True
    inputs, _, output = str(node.args[0]).replace(" ", "").partition("->")
    return bool(set(inputs) - set(output) - {","})


def _is_full(facts: Facts, step: Recurrence) -> bool:
    """Whether each number of the state has a decay of its own, not one for a row or a head."""
    decay = _decay(facts, step)
    return decay is not None and serves_one(facts, decay, facts.shapes[step.next])


def serves_one(facts: Facts, decay: fx.Node, state: Shape) -> bool:
    """Whether a decay is not copied along one of the last two axes of the state, here or on the way."""
    if _copied(facts.shapes.get(decay, ()), state):
        return False
    for _ in range(8):
        sources = [n for n in facts.inputs[decay] if n in facts.activations | facts.learned and n in facts.shapes]
        if not sources:
            around, whole = facts.outer.get(decay, (None, None))
            return around is None or whole is None or serves_one(around, whole, around.shapes[whole])
        shape = facts.shapes[decay]
        if set.intersection(*(_copied(facts.shapes[n], shape) for n in sources)):
            return False
        decay = max(sources, key=facts.size)
    return True


def _copied(source: Shape, target: Shape) -> set[int]:
    """Along which of the last two axes a tensor is copied to become another one; along none if that is not all."""
    given = (*((1,) * (len(target) - len(source))), *source)
    if len(given) != len(target) or any(g not in (1, t) for g, t in zip(given, target, strict=True)):
        return set()
    return {a for a in (-1, -2) if len(target) >= -a and given[a] == 1 != target[a]}


def is_outer(facts: Facts, node: fx.Node) -> bool:
    """Whether a tensor is a product of smaller ones: of a value and a key, say."""
    for n in facts.above(node, lambda n: facts.names[n] in PROJECTIONS, 24):
        if n in facts.outer and is_outer(*facts.outer[n]):
            return True
        if facts.names[n] in PRODUCTS | {"mul"}:
            sizes = [facts.size(o) for o in facts.inputs[n] if o in facts.activations or o in facts.learned]
            if len(sizes) > 1 and max(sizes) < facts.size(n):
                return True
    return False


def _is_fed_by_products(facts: Facts, step: Recurrence) -> bool:
    ours = step.carried | {step.state}
    sums = (n for n in step.carried if facts.names[n] in ("add", "addcmul", "lerp", "sub"))
    return any(is_outer(facts, o) for n in sums for o in facts.inputs[n] if o not in ours)


def _is_data_dependent(facts: Facts, step: Recurrence) -> bool:
    decay = _decay(facts, step)
    return decay is not None and decay in facts.activations


def _is_linear_and_apart(facts: Facts, step: Recurrence) -> bool:
    return step.emitted and _decays(facts, step) and not _mixes(facts, step)


def _is_elementwise(facts: Facts, step: Recurrence) -> bool:
    names = [facts.names[n] for n in step.carried]
    solves = "sub" in names and sum(name in _SCALES for name in names) > 1  # x_i = b_i (y_i - c_i x_j): substitution
    return _is_linear_and_apart(facts, step) and not solves and not _is_contracted(facts, step)


def _is_wide(facts: Facts, step: Recurrence) -> bool:
    """A state that is read with weights, and a decay for each of its numbers: no key that all of a row share."""
    apart = _is_linear_and_apart(facts, step) and _is_fed_by_products(facts, step)
    return apart and _is_full(facts, step) and _is_contracted(facts, step)


# From what happens in a step to a name; the first that holds. Wide states with a shared decay are linear attention.
KINDS: tuple[tuple[str, Callable[[Facts, Recurrence], bool]], ...] = (
    # tanh, sigmoid and the like act on the state.
    (NONLINEAR, _is_nonlinear),
    # h = W h + x
    (DENSE, lambda facts, step: step.emitted and _is_dense(facts, step)),
    # h[d, n] = exp(dt[d] A[d, n]) h[d, n] + u[d, n], y[d] = sum_n C[n] h[d, n]
    (SELECTIVE_SCAN, lambda facts, step: _is_wide(facts, step) and _is_data_dependent(facts, step)),
    (STATE_SPACE, _is_wide),
    # h[d] = a[d] h[d] + u[d], y = h
    (GATED, lambda facts, step: _is_elementwise(facts, step) and _is_data_dependent(facts, step)),
    (FIXED, _is_elementwise),
)
