"""What a recurrence is called: by what happens to the state from one step to the next, and how it is read.

Loops and scans are found elsewhere (loops.py, scans.py); both hand over a `Recurrence`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import fx

from llcompile.passes.mechanisms.facts import Facts, Shape
from llcompile.passes.mechanisms.vocabulary import PRODUCTS, PROJECTIONS, SPREADING

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
    size = facts.size(step.next)
    return any(_sums(facts, n, size) for n in inside) or any(_sums(known, n, size) for n in outside)


def _readers(
    facts: Facts, starts: Iterable[fx.Node], inner: frozenset[fx.Node], stop: Callable[[fx.Node], bool]
) -> Iterable[fx.Node]:
    for start in starts:
        if start in facts.position:
            yield from (n for n in facts.below(start, stop, 24) if n is not start and n not in inner)


def _sums(facts: Facts, node: fx.Node, size: int) -> bool:
    """A sum over an axis of something as large as the state, with another activation."""
    if facts.names[node] == "sum":
        source = node.args[0]
        return isinstance(source, fx.Node) and facts.size(node) < facts.size(source)
    factors = facts.factors(node)
    return factors is not None and facts.size(node) < max(map(facts.size, factors))


def _is_full(facts: Facts, step: Recurrence) -> bool:
    """Whether each number of the state has a decay of its own, not one for a row or a head."""
    decay = _decay(facts, step)
    return decay is not None and serves_one(facts, decay, facts.shapes[step.next])


def serves_one(facts: Facts, decay: fx.Node, state: Shape) -> bool:
    """Whether a decay is not copied along the last two axes of the state, here or on the way."""
    if _is_copied(facts.shapes.get(decay, ()), state):
        return False
    for _ in range(8):
        sources = [n for n in facts.inputs[decay] if n in facts.shapes]
        if not sources:
            break
        source = max(sources, key=facts.size)
        if facts.names[decay] in SPREADING and _is_copied(facts.shapes[source], facts.shapes[decay]):
            return False
        decay = source
    return True


def _is_copied(source: Shape, target: Shape) -> bool:
    given = (1, 1, *source)
    return any(given[a] == 1 != target[a] for a in (-1, -2) if len(target) >= -a)


def _is_data_dependent(facts: Facts, step: Recurrence) -> bool:
    decay = _decay(facts, step)
    return decay is not None and decay in facts.activations


def _is_linear_and_apart(facts: Facts, step: Recurrence) -> bool:
    return step.emitted and _decays(facts, step) and not _mixes(facts, step)


def _is_elementwise(facts: Facts, step: Recurrence) -> bool:
    return _is_linear_and_apart(facts, step) and not _is_contracted(facts, step)


def _is_wide(facts: Facts, step: Recurrence) -> bool:
    """A state that is read with weights, and a decay for each of its numbers: no key that all of a row share."""
    return _is_linear_and_apart(facts, step) and _is_full(facts, step) and _is_contracted(facts, step)


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
