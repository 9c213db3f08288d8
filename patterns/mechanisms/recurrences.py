"""What a recurrence is called: by what happens to the state from one step to the next, and how it is read.

Loops and scans are found elsewhere (loops.py, scans.py); both hand over a `Recurrence`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from llcompile.patterns.mechanisms.facts import Facts
from llcompile.patterns.mechanisms.vocabulary import PRODUCTS, WEIGHTS
from llcompile.patterns.structure.program import Value

SELECTIVE_SCAN = "selective scan (Mamba-1)"
STATE_SPACE = "state space scan (S4)"
GATED = "gated linear recurrence (RG-LRU)"
FIXED = "linear recurrence with a fixed decay"
DENSE = "linear recurrence with a dense transition"
NONLINEAR = "non-linear recurrence (RNN)"
# It is not known what such a loop does: its steps cannot be written out.
WHOLE_LOOP = "loop whose number of steps is not known (while_loop)"

# One of these on the way from a state to the next one, and the recurrence is not linear.
_CURVES = "tanh sigmoid relu gelu silu softplus elu leaky_relu hardtanh hardsigmoid mish exp sin cos erf pow abs sign "
_CURVES += "clamp clamp_min clamp_max rsqrt norm linalg_vector_norm native_layer_norm _fused_rms_norm _softmax "
_CURVES += "_safe_softmax log_sigmoid_forward _thnn_fused_lstm_cell _thnn_fused_gru_cell"
_CURVED = frozenset(_CURVES.split())
_SCALES = frozenset({"mul", "addcmul", "lerp"})
_SUMS = frozenset({"add", "addcmul", "lerp", "sub", "rsub"})
# How many values of a long way are looked at: to the readers of a state, to the factors of what is added to it.
_REACH = 48


@dataclass(frozen=True)
class Recurrence:
    """One step of it.

    Args:
        state: what comes in from the step before.
        next: what goes on to the step after.
        carried: the values that lie on the way between, the last one included.
        reads: those of them, or values of other steps, that hold the state for readers outside of the loop.
    """

    state: Value
    next: Value
    carried: frozenset[Value]
    reads: tuple[Value, ...]

    @property
    def ours(self) -> frozenset[Value]:
        """All that the state has a part in."""
        return self.carried | {self.state}


def name_of(facts: Facts, step: Recurrence) -> str:
    """The usual name, or "" for what is none of these: linear attention, a running sum."""
    return next((kind for kind, holds in KINDS if holds(facts, step)), "")


def _is_nonlinear(facts: Facts, step: Recurrence) -> bool:
    """The state goes through a curve, or is multiplied with itself."""
    multiplies = (v for v in step.carried if facts.names[v] in PRODUCTS | {"mul"})
    squares = any(len(step.ours.intersection(facts.inputs(v))) > 1 for v in multiplies)
    return squares or any(facts.names[v] in _CURVED for v in step.carried)


def _is_dense(facts: Facts, step: Recurrence) -> bool:
    """A learned matrix takes the state to the next one."""
    products = (v for v in step.carried if facts.names[v] in PRODUCTS)
    return bool(step.reads) and any(not facts.learned.isdisjoint(facts.inputs(v)) for v in products)


def _decay(facts: Facts, step: Recurrence) -> Value | None:
    """What the state is multiplied with in a step; None where that is a number or nothing."""
    for value in step.carried:
        if facts.names[value] in _SCALES:
            others = [v for v in facts.inputs(value) if v not in step.ours]
            if others:
                return others[-1] if facts.names[value] == "lerp" else max(others, key=facts.size)
    return None


def _mixes(facts: Facts, step: Recurrence) -> bool:
    """Whether parts of the state act on each other: a matrix transition, such as the delta rule's."""
    mixing = PRODUCTS | {"convolution", "sum", "cumsum", "roll"}
    return any(facts.names[v] in mixing for v in step.carried)


def _is_contracted(facts: Facts, step: Recurrence) -> bool:
    """Whether readers sum over a part of the state: it is wider than what is read."""
    starts = {*step.carried, *step.reads}
    readers = (v for start in starts for v in facts.below(start, partial(is_sum, facts), _REACH) if v is not start)
    return any(contracts(facts, v) for v in readers if v not in step.carried)


def is_sum(facts: Facts, value: Value) -> bool:
    """Whether the value is a sum over an axis, of one tensor or of a product."""
    return facts.names[value] in WEIGHTS or facts.names[value] == "sum"


def contracts(facts: Facts, value: Value) -> bool:
    """Whether the value is a sum over an axis, with another activation or plainly."""
    if facts.names[value] == "sum":
        return any(facts.size(value) < facts.size(v) for v in facts.inputs(value))
    return facts.factors(value) is not None


def serves_one(facts: Facts, decay: Value, state: tuple[int, ...]) -> bool:
    """Whether a decay is not copied along one of the last two axes of the state, here or on the way."""
    if _copied(decay.shape, state):
        return False
    for _ in range(16):
        sources = [v for v in facts.inputs(decay) if v in facts.activations or v in facts.learned]
        if not sources:
            return True
        if set.intersection(*(_copied(v.shape, decay.shape) for v in sources)):
            return False
        decay = max(sources, key=facts.size)
    return True


def _copied(source: tuple[int, ...], target: tuple[int, ...]) -> set[int]:
    """Along which of the last two axes a tensor is copied to become another one; along none if that is not all."""
    given = (*((1,) * (len(target) - len(source))), *source)
    if len(given) != len(target) or any(g not in (1, t) for g, t in zip(given, target, strict=True)):
        return set()
    return {a for a in (-1, -2) if len(target) >= -a and given[a] == 1 != target[a]}


def is_outer(facts: Facts, value: Value) -> bool:
    """Whether a tensor is a product of smaller ones: of a value and a key, say."""
    for v in facts.above(value, facts.is_projection, _REACH):
        if facts.names[v] in PRODUCTS | {"mul"} and not facts.is_projection(v):
            sizes = [facts.size(o) for o in facts.inputs(v) if o in facts.activations or o in facts.learned]
            if len(sizes) > 1 and max(sizes) < facts.size(v):
                return True
    return False


def _is_fed_by_products(facts: Facts, step: Recurrence) -> bool:
    sums = (v for v in step.carried if facts.names[v] in _SUMS)
    return any(is_outer(facts, o) for v in sums for o in facts.inputs(v) if o not in step.ours)


def _is_data_dependent(facts: Facts, step: Recurrence) -> bool:
    return _decay(facts, step) in facts.activations


def _is_linear_and_apart(facts: Facts, step: Recurrence) -> bool:
    decays = any(facts.names[v] in _SCALES for v in step.carried)
    return bool(step.reads) and decays and not _mixes(facts, step)


def _is_elementwise(facts: Facts, step: Recurrence) -> bool:
    names = [facts.names[v] for v in step.carried]
    # x_i = b_i (y_i - c_i x_j) is a substitution.
    solves = not {"sub", "rsub"}.isdisjoint(names) and sum(name in _SCALES for name in names) > 1
    return _is_linear_and_apart(facts, step) and not solves and not _is_contracted(facts, step)


def _is_wide(facts: Facts, step: Recurrence) -> bool:
    """A state that is read with weights, and a decay for each of its numbers: no key that all of a row share."""
    apart = _is_linear_and_apart(facts, step) and _is_fed_by_products(facts, step)
    decay = _decay(facts, step)
    full = decay is not None and serves_one(facts, decay, step.next.shape)
    return apart and full and _is_contracted(facts, step)


# From what happens in a step to a name; the first that holds. Wide states with a shared decay are linear attention.
KINDS: tuple[tuple[str, Callable[[Facts, Recurrence], bool]], ...] = (
    # tanh, sigmoid and the like act on the state.
    (NONLINEAR, _is_nonlinear),
    # h = W h + x
    (DENSE, _is_dense),
    # h[d, n] = exp(dt[d] A[d, n]) h[d, n] + u[d, n], y[d] = sum_n C[n] h[d, n]
    (SELECTIVE_SCAN, lambda facts, step: _is_wide(facts, step) and _is_data_dependent(facts, step)),
    (STATE_SPACE, _is_wide),
    # h[d] = a[d] h[d] + u[d], y = h
    (GATED, lambda facts, step: _is_elementwise(facts, step) and _is_data_dependent(facts, step)),
    (FIXED, _is_elementwise),
)
