"""Linearity: how far an output is from being linear in what it is computed from, on draws in float64."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable

import torch
from torch import fx

from llcompile.patterns.agreement import apart, undisturbed
from llcompile.patterns.graph.regions import Region
from llcompile.patterns.structure.execute import function_of
from llcompile.patterns.structure.program import Op, Program, Value
from llcompile.patterns.structure.record import record


def off_linear(region: Region, parts: Iterable[tuple[list[fx.Node], fx.Node]], operands: list[fx.Node]) -> float:
    """How far the outputs are from being linear in the values, relative to their largest.

    Args:
        region: where they stand.
        parts: (what the values are made of, the output) of each part.
        operands: the nodes of all operands; others than the values are drawn.
    """
    with undisturbed(), torch._C.DisableTorchFunction():
        program = record(region)
        return max(min(_off(program, v, operands, output) for v in values) for values, output in parts)


def _off(program: Program, values: fx.Node, operands: list[fx.Node], output: fx.Node) -> float:
    given, result = program.results.get(values), program.results.get(output)
    if given is None or result is None or not given.dtype.is_floating_point:
        return math.inf
    held = {program.results[node] for node in operands if node in program.results} - {given}
    ops, drawn = _between(program, given, held, result)
    if any(not value.dtype.is_floating_point for value in drawn) or not any(result in op.outputs for op in ops):
        return math.inf
    run = torch._dynamo.disable(function_of(ops, [given, *drawn], result, None, torch.float64))
    generator, worst = torch.Generator().manual_seed(0), 0.0
    draw = lambda value: torch.randn(value.shape, generator=generator, dtype=torch.float64)  # noqa: E731
    for _ in range(2):
        first, second, rest = draw(given), draw(given), [draw(value).abs() + 0.1 for value in drawn]
        want = 2.5 * run(first, *rest) - run(second, *rest)
        if not 0 < float(want.abs().max()) < math.inf:
            return math.inf
        worst = max(worst, apart([want], [run(2.5 * first - second, *rest)]))
    return worst


def _between(program: Program, given: Value, operands: Container[Value], result: Value) -> tuple[list[Op], list[Value]]:
    """The operations that compute a result from a value, and what else comes in: the other operands, say.

    What comes from numbers of the code alone (an empty state, a mask of positions) is computed as it is.
    """
    known = {v for v in program.inputs if v.data is not None}
    inner = {given, *(v for v in program.values() if v in operands)}
    for op in program.ops:
        if not inner.isdisjoint(op.inputs):
            inner.update(op.outputs)
        elif known.issuperset(op.inputs):
            known.update(op.outputs)
    needed, ops, drawn = [result], set[Op](), dict[Value, None]()
    for value in needed:  # which grows
        if value is given or value.data is not None:
            continue
        if value.op is None or value in operands or not (value in inner or value in known):
            drawn[value] = None
        elif value.op not in ops:
            ops.add(value.op)
            needed.extend(value.op.inputs)
    return [op for op in program.ops if op in ops], list(drawn)
