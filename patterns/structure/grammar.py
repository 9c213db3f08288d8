"""Grammar: what a mixer may consist of, by the ATen operation.

The draws of a proof confirm; they cannot find what they do not reach. An analytic function that agrees with another one
on random numbers agrees with it everywhere. One that is put together from pieces does not: each of its pieces must be
shown to be idle, or be met by the draws (see `pieces`). Nothing is known of what stands in no table here, and a mixer
has nothing random in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from llcompile.patterns import reasons
from llcompile.patterns.reasons import GivenReason
from llcompile.patterns.structure.moves import SHAPES, names
from llcompile.patterns.structure.program import Op

# What takes numbers out, puts them together, or sets some of them; where, is known without looking at numbers.
PARTS = names(
    "narrow unfold diagonal diag_embed cat stack repeat constant_pad_nd",
    "select_scatter slice_scatter diagonal_scatter index_put index index_select gather flip roll copy where",
    "index_add scatter_add",
    "masked_fill tril triu lift_fresh_copy as_strided squeeze_ index_copy scatter _reshape_alias",
)
# Sums and products, the solve of the delta rule among them.
SUMS = names(
    "add sub rsub mul div neg reciprocal sum mean cumsum cumprod prod mm bmm mv dot addmm baddbmm addcmul addcdiv",
    "addmv addbmm lerp outer convolution linalg_solve_triangular triangular_solve linalg_inv_ex linalg_solve_ex",
    "_linalg_solve_ex linalg_lu_factor_ex linalg_lu_solve matrix_exp linalg_matrix_exp trace square pow",
)
# Functions of one number that are analytic where they are defined.
SMOOTH = names(
    "exp exp2 expm1 log log2 log10 log1p sqrt rsqrt sigmoid log_sigmoid_forward tanh silu gelu mish erf sin cos",
    "softplus logaddexp logsumexp logcumsumexp _softmax linalg_vector_norm native_layer_norm _fused_rms_norm",
)
# What picks one of several numbers; numbers drawn at random are picked in turn.
PICKS = names("amax amin max min cummax cummin")
# Of `detach`, `barriers` speaks.
ANALYTIC = SHAPES | {"detach"} | PARTS | SUMS | SMOOTH | PICKS


def _bounds(op: Op) -> list[float]:
    given = [*op.args[1:3], *(op.kwargs.get(name) for name in ("min", "max"))]
    return [float(a) for a in given if type(a) in (int, float)]


def _at(*numbers: float) -> Callable[[Op], list[float]]:
    return lambda op: list(numbers)


def _given(place: int, default: float) -> Callable[[Op], list[float]]:
    return lambda op: [float(op.args[place]) if len(op.args) > place else default]


def _around(place: int, default: float) -> Callable[[Op], list[float]]:
    return lambda op: [sign * number for number in _given(place, default)(op) for sign in (-1, 1)]


# Operations that change from one function to another where their first argument (of two tensors: their difference)
# crosses a number -> these numbers.
PIECES: Mapping[str, Callable[[Op], list[float]]] = {
    **dict.fromkeys(["relu", "abs", "leaky_relu", "elu", "_prelu_kernel", "celu"], _at(0.0)),
    **dict.fromkeys(["clamp", "clamp_min", "clamp_max"], _bounds),
    **dict.fromkeys(["hardsigmoid", "hardswish"], _at(-3.0, 3.0)),
    **dict.fromkeys(["maximum", "minimum", "fmax", "fmin"], _at(0.0)),
    **dict.fromkeys(["softshrink", "hardshrink"], _around(1, 0.5)),
    "hardtanh": lambda op: [*_given(1, -1.0)(op), *_given(2, 1.0)(op)],
    "threshold": _given(1, 0.0),
}
_STRAIGHT = 16.0  # from there on a softplus is a straight line to eight digits


def pieces(op: Op) -> list[float]:
    """The numbers at which an operation changes from one function to another."""
    if op.name == "softplus":
        number = lambda at, default: float(op.args[at]) if len(op.args) > at else default  # noqa: E731
        beta, threshold = number(1, 1.0), number(2, 20.0)
        return [threshold / beta] if threshold < _STRAIGHT else []
    return PIECES[op.name](op) if op.name in PIECES else []


def stranger(op: Op, where: str) -> GivenReason | None:
    """Why an operation on what comes in, at a line, has no place in a mixer; None where it may have one."""
    if op.is_random:
        return reasons.RANDOM(operation=op.name, where=where)
    given, made = [v.dtype for v in op.inputs], op.outputs[0].dtype if op.outputs else torch.float32
    if op.name == "_to_copy" and given[0].is_floating_point and (not made.is_floating_point or made.itemsize < 2):
        return reasons.ROUNDING(operation=op.name, where=where, dtype=made)
    if op.name == "pow" and not _is_whole_power(op):
        return None
    if op.kwargs.get("rounding_mode") is not None or (op.name not in ANALYTIC and op.name not in PIECES):
        return reasons.UNKNOWN_OPERATION(operation=op.name, where=where)
    return None


def _is_whole_power(op: Op) -> bool:
    exponent: Any = op.args[1] if len(op.args) > 1 else None
    return type(exponent) in (int, float) and math.isfinite(exponent) and exponent == int(exponent)


# -- what is computed from positions alone

# Operations that step from one value to another.
STEPS = names(
    "lt le gt ge eq ne floor_divide remainder fmod div bitwise_left_shift bitwise_right_shift __rshift__ __lshift__",
    "bitwise_and bitwise_or bitwise_xor bucketize searchsorted clamp clamp_min clamp_max minimum maximum floor ceil",
    "round trunc sign isin _to_copy",
)
# Operations that divide by how many there are.
AVERAGES = names("mean var std var_mean std_mean native_layer_norm native_group_norm linalg_vector_norm")
# Operations that read a table at numbers.
LOOKUPS = names("index index_select gather embedding take take_along_dim")
