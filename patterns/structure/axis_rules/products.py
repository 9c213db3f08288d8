"""Axis rules of matrix products, of what solves by them, and of attention."""

from __future__ import annotations

from llcompile.patterns.boundary import NotKnown
from llcompile.patterns.structure.axes import Axes
from llcompile.patterns.structure.axis_rules.call import Call, Rules


def _bmm(c: Call) -> list[Axes]:
    first, second = c.axes[c.op.inputs[-2]], c.axes[c.op.inputs[-1]]
    return [_matmul(c, first, second)]


def _matmul(c: Call, first: Axes, second: Axes) -> Axes:
    c.pair(first[-1], second[-2] if len(second) > 1 else second[-1])
    c.mix(first[-1] or (second[-2] if len(second) > 1 else second[-1]))
    heads = tuple(c.pair(a, b) for a, b in zip(first[:-2], second[:-2], strict=True))
    return (*heads, *(first[-2:-1] if len(first) > 1 else ()), *(second[-1:] if len(second) > 1 else ()))


def _distances(c: Call) -> list[Axes]:
    """All pairs of rows, as in a product with the transposed."""
    first, second = (c.axes[value] for value in c.op.inputs[:2])
    return [_matmul(c, first, (*second[:-2], second[-1], second[-2]))]


def _added_matmul(c: Call) -> list[Axes]:
    axes = _bmm(c)[0]
    bias = c.axes[c.op.inputs[0]]
    for i, axis in enumerate(bias):
        c.pair(axes[len(axes) - len(bias) + i], axis)
    return [axes]


def _solve(c: Call) -> list[Axes]:
    operands = (c.arg("A") if c.arg("A") is not None else c.arg("self"), c.arg("B"))
    matrix, right = (c.axes[value] for value in operands)
    if len(right) < 2:
        raise NotKnown("solved for a vector")
    c.dims.same(matrix[-1], matrix[-2])
    c.pair(matrix[-1], right[-2])
    for a, b in zip(matrix[:-2], right[:-2], strict=False):
        c.pair(a, b)
    c.mix(matrix[-1])
    return [right] * len(c.op.outputs)


def _solve_ex(c: Call) -> list[Axes]:
    solved = _solve(c)[0]
    return [solved if v.shape == c.arg("B").shape else c.new(i) for i, v in enumerate(c.op.outputs)]


def _inverse(c: Call) -> list[Axes]:
    axes = c.axes[c.first]
    c.dims.same(axes[-1], axes[-2])
    c.mix(axes[-1])
    return [axes if len(v.shape) == len(axes) else c.new(i) for i, v in enumerate(c.op.outputs)]


def _attention(c: Call) -> list[Axes]:
    query, key, value = c.of("query"), c.of("key"), c.of("value")
    c.mix(query[-2], key[-2])
    out = (*query[:-1], value[-1])
    return [out, *(c.new(i) for i in range(1, len(c.op.outputs)))]


# Rule, and the operations that follow it.
RULES: Rules = (
    (_bmm, "bmm mm mv dot"),
    (_distances, "_cdist_forward _euclidean_dist"),
    (_added_matmul, "addmm baddbmm addmv"),
    (_solve, "linalg_solve_triangular"),
    (_solve_ex, "_linalg_solve_ex"),
    (_inverse, "linalg_inv_ex inverse"),
    (
        _attention,
        "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_attention_math "
        "_scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention",
    ),
)
