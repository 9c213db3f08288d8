"""Ranges: bounds on the numbers of each value, so that proofs draw what the code can meet (a decay in (0, 1), say)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch

from llcompile.patterns.structure.moves import SHAPES, names
from llcompile.patterns.structure.program import Op, Program, Value

Range = tuple[float, float]
REALS: Range = (-math.inf, math.inf)
_INF = math.inf


def ranges(program: Program, numbers: bool = True) -> dict[Value, Range]:
    """The range of every value; all reals where nothing is known.

    Args:
        program: the graph.
        numbers: whether the numbers of the model's buffers count as known.
    """
    found: dict[Value, Range] = {}
    for value in program.inputs:
        found[value] = _of_data(value) if numbers or not value.is_read else REALS
    for op in program.ops:
        made = _of_op(op, found)
        for value in op.outputs:
            found[value] = made if not any(map(math.isnan, made)) else REALS
    return found


def hull(parts: Iterable[Range]) -> Range:
    """The range of what is in one of several."""
    lows, highs = zip(*parts, strict=True)
    return min(lows), max(highs)


def _of_op(op: Op, found: dict[Value, Range]) -> Range:
    rule = _RULES.get(op.name)
    if rule is None or not _UNKNOWN.isdisjoint(op.kwargs):
        return REALS
    return rule(op, [g for g in (_given(a, found) for a in op.args) if g is not None])


# Arguments that change what an operation computes.
_UNKNOWN = frozenset(["alpha", "rounding_mode"])
_REAL = frozenset([torch.float16, torch.bfloat16, torch.float32, torch.float64])


def _of_data(value: Value) -> Range:
    data = value.data
    if data is None or data.numel() == 0 or data.dtype not in _REAL or data.layout != torch.strided:
        return REALS
    return float(data.min()), float(data.max())


def _given(argument: object, found: dict[Value, Range]) -> Range | None:
    if isinstance(argument, Value):
        return found.get(argument, REALS)
    if isinstance(argument, (list, tuple)) and any(isinstance(a, Value) for a in argument):
        return hull(found.get(a, REALS) for a in argument if isinstance(a, Value))
    if isinstance(argument, (bool, int, float)):
        return float(argument), float(argument)
    return REALS if isinstance(argument, complex) else None


def _times(a: float, b: float) -> float:
    return 0.0 if a == 0 or b == 0 else a * b


def _difference(a: Range, b: Range) -> Range:
    return a[0] - b[1], a[1] - b[0]


def _mul(op: Op, r: list[Range]) -> Range:
    products = [_times(a, b) for a in r[0] for b in r[1]]
    if len(op.inputs) == 2 and op.inputs[0] is op.inputs[1]:
        return 0.0, max(products)
    return min(products), max(products)


def _div(op: Op, r: list[Range]) -> Range:
    low, high = r[1]
    if low <= 0 <= high:
        positive = low >= 0 and r[0][0] >= 0
        return (0.0, _INF) if positive else REALS
    return _mul(op, [r[0], (1 / high if high != _INF else 0.0, 1 / low if low != -_INF else 0.0)])


def _monotone(function: Callable[[float], float]) -> Callable[[Op, list[Range]], Range]:
    return lambda op, r: (function(r[0][0]), function(r[0][1]))


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else _INF


def _log(x: float) -> float:
    return math.log(x) if 0 < x < _INF else -_INF if x <= 0 else _INF


def _softplus(x: float) -> float:
    return x if x > 30 else math.log1p(_exp(x))


def _sigmoid(x: float) -> float:
    return 1 / (1 + _exp(-x))


def _abs(op: Op, r: list[Range]) -> Range:
    low, high = r[0]
    return (0.0 if low <= 0 <= high else min(abs(low), abs(high))), max(abs(low), abs(high))


def _pow(op: Op, r: list[Range]) -> Range:
    base, exponent = r[0], r[1] if len(r) > 1 else REALS
    if exponent == (2.0, 2.0):
        return _mul_self(base)
    if exponent[0] == exponent[1] and exponent[0] % 2 == 0:
        return 0.0, _INF
    if base[0] > 0 and base[1] <= 1 and exponent[0] >= 0:
        return 0.0, 1.0
    return (0.0, _INF) if base[0] >= 0 else REALS


def _mul_self(r: Range) -> Range:
    squares = [_times(x, x) for x in r]
    return (0.0 if r[0] <= 0 <= r[1] else min(squares)), max(squares)


def _clamp(op: Op, r: list[Range]) -> Range:
    low = op.args[1] if len(op.args) > 1 else op.kwargs.get("min")
    high = op.args[2] if len(op.args) > 2 else op.kwargs.get("max")
    bounds = [-_INF if not isinstance(low, (int, float)) else low, _INF if not isinstance(high, (int, float)) else high]
    return max(r[0][0], bounds[0]), min(max(r[0][1], bounds[0]), bounds[1])


def _clamp_min(op: Op, r: list[Range]) -> Range:
    return max(r[0][0], r[1][0]), max(r[0][1], r[1][0])


def _clamp_max(op: Op, r: list[Range]) -> Range:
    return min(r[0][0], r[1][1]), min(r[0][1], r[1][1])


def _fixed(low: float, high: float) -> Callable[[Op, list[Range]], Range]:
    return lambda op, r: (low, high)


def _full(op: Op, r: list[Range]) -> Range:
    value = op.args[1] if len(op.args) > 1 else None
    return (float(value), float(value)) if isinstance(value, (int, float)) else REALS


def _sum(op: Op, r: list[Range]) -> Range:
    return (0.0, _INF) if r[0][0] >= 0 else (-_INF, 0.0) if r[0][1] <= 0 else REALS


def _elu(op: Op, r: list[Range]) -> Range:
    """elu(x, alpha, scale, input_scale): scale * x above 0, scale * alpha * (exp(input_scale * x) - 1) below."""
    alpha, scale, steep = (_constant(g) for g in [*r[1:], *[(1.0, 1.0)] * 3][:3])
    if alpha is None or scale is None or steep is None or min(alpha, scale, steep) < 0:
        return REALS
    one = lambda x: scale * (x if x > 0 else alpha * (_exp(steep * x) - 1))  # noqa: E731
    return one(r[0][0]), one(r[0][1])


def _softplus_of(op: Op, r: list[Range]) -> Range:
    """softplus(x, beta, threshold)."""
    beta = _constant(r[1]) if len(r) > 1 else 1.0
    if beta is None or beta <= 0:
        return REALS
    return _softplus(beta * r[0][0]) / beta, max(r[0][1], _softplus(beta * r[0][1]) / beta)


def _threshold(op: Op, r: list[Range]) -> Range:
    """threshold(x, threshold, value): x above, value below."""
    return min(max(r[0][0], r[1][0]), r[2][0]), max(r[0][1], r[2][1])


def _constant(bounds: Range) -> float | None:
    return bounds[0] if bounds[0] == bounds[1] else None


def _product(op: Op, r: list[Range]) -> Range:
    """Sums of products: only the sign is known."""
    low, high = _mul(op, r[:2])
    return (0.0 if low >= 0 else -_INF), (0.0 if high <= 0 else _INF)


_SAME = SHAPES | names("detach repeat cat stack index index_select flip roll mean amax amin lift_fresh_copy diagonal")
_RULES: dict[str, Callable[[Op, list[Range]], Range]] = {
    **dict.fromkeys(_SAME, lambda op, r: r[0]),
    "add": lambda op, r: (r[0][0] + r[1][0], r[0][1] + r[1][1]),
    "sub": lambda op, r: _difference(r[0], r[1]),
    "rsub": lambda op, r: _difference(r[1], r[0]),
    "mul": _mul,
    "div": _div,
    "neg": lambda op, r: (-r[0][1], -r[0][0]),
    "exp": _monotone(_exp),
    "exp2": _monotone(lambda x: _exp(x * math.log(2))),
    "log": _monotone(_log),
    "softplus": _softplus_of,
    "sigmoid": _monotone(_sigmoid),
    "log_sigmoid_forward": _monotone(lambda x: -_softplus(-x)),
    "tanh": _monotone(math.tanh),
    "relu": _monotone(lambda x: max(x, 0.0)),
    "sqrt": _monotone(lambda x: math.sqrt(max(x, 0.0))),
    "abs": _abs,
    "pow": _pow,
    "square": lambda op, r: _mul_self(r[0]),
    "clamp": _clamp,
    "clamp_min": _clamp_min,
    "clamp_max": _clamp_max,
    "rsqrt": _fixed(0.0, _INF),
    "_softmax": _fixed(0.0, 1.0),
    "elu": _elu,
    "hardtanh": lambda op, r: _clamp_max(op, [_clamp_min(op, r), r[2]]) if len(r) == 3 else (-1.0, 1.0),
    "threshold": _threshold,
    "silu": _fixed(-0.28, _INF),
    "gelu": _fixed(-0.17, _INF),
    "hardswish": _fixed(-0.375, _INF),
    "sin": _fixed(-1.0, 1.0),
    "cos": _fixed(-1.0, 1.0),
    "erf": _fixed(-1.0, 1.0),
    "reciprocal": lambda op, r: _div(op, [(1.0, 1.0), r[0]]),
    "mm": _product,
    "bmm": _product,
    "mv": _product,
    "dot": _product,
    "expm1": _monotone(lambda x: _exp(x) - 1),
    "log1p": _monotone(lambda x: _log(1 + x)),
    "hardsigmoid": _fixed(0.0, 1.0),
    "linalg_vector_norm": _fixed(0.0, _INF),
    "where": lambda op, r: hull(r[1:3]),
    "masked_fill": lambda op, r: hull((r[0], r[-1])),
    **dict.fromkeys(["tril", "triu"], lambda op, r: hull((r[0], (0.0, 0.0)))),
    "maximum": _clamp_min,
    "minimum": _clamp_max,
    "full": _full,
    "ones": _fixed(1.0, 1.0),
    "ones_like": _fixed(1.0, 1.0),
    "zeros": _fixed(0.0, 0.0),
    "zeros_like": _fixed(0.0, 0.0),
    "sum": _sum,
    "cumsum": _sum,
}
