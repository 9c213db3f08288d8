"""Barriers: what a subgraph may not reach over, because it changes more than numbers: a gradient, or a dtype.

The operator has the gradient of the formula. A `detach`, a region of `torch.no_grad()` or a function with a backward of
its own inside of a subgraph have another one. They may stand above its operands, where they stay.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from llcompile.patterns import reasons
from llcompile.patterns.graph.walk import walk
from llcompile.patterns.structure.classify import Rejection
from llcompile.patterns.structure.cut import Subgraph
from llcompile.patterns.structure.facts import TimeAnalysis
from llcompile.patterns.structure.lifted import Lifted
from llcompile.patterns.structure.modes import Mode, is_function
from llcompile.patterns.structure.nested import leaves
from llcompile.patterns.structure.program import Op, Program
from llcompile.patterns.structure.tail import Tail
from llcompile.torch_internals.places import user_line

_NEAR = 3  # it is a mixer but for this


def expect_no_barrier(
    subgraph: Subgraph, tail: Tail | None, analysis: TimeAnalysis, program: Program, divides: bool = False
) -> None:
    """Nothing inside of the subgraph stops or changes a gradient or a dtype.

    Args:
        subgraph, tail: the mixer.
        analysis, program: of the graph.
        divides: it sums scores alone. All of a divisor may be without a gradient: the rewrite detaches its result.

    Raises:
        Rejection: something does.
    """
    output = subgraph.result if tail is None else tail.output
    assert output.op is not None
    mode = output.op.mode
    if program.grad and not mode.grad:
        raise Rejection(reasons.NO_GRAD(), _NEAR)
    stopped = divides and subgraph.is_detached
    for op in subgraph.ops:
        if _is_followed(op, analysis) and not (stopped and op.name == "detach"):
            _expect_passes(op)
            _expect_mode(op, mode)
    for op in around(subgraph, tail):
        _expect_mode(op, mode)
        if op.mode.function is not None:
            _expect_passes(op)


def _is_followed(op: Op, analysis: TimeAnalysis) -> bool:
    """Whether it computes on what the model is given or learns: masks of positions have no gradient."""
    facts = [analysis.facts[value] for value in op.inputs if value in analysis.facts]
    return any(fact.data or fact.weight for fact in facts)


def _expect_passes(op: Op) -> None:
    if op.mode.function is not None or is_function(op.node):
        raise Rejection(reasons.FUNCTION_INSIDE(at=_at(op)), _NEAR)
    if op.name == "detach":
        raise Rejection(reasons.GRADIENT_STOPPED(at=_at(op)), _NEAR)
    if isinstance(op.target, torch._ops.OpOverload) and op.target.namespace not in ("aten", "prims"):
        raise Rejection(reasons.UNKNOWN_BACKWARD(operation=op.target, at=_at(op)), _NEAR)


def _expect_mode(op: Op, mode: Mode) -> None:
    if op.mode.grad != mode.grad:
        raise Rejection(reasons.NO_GRAD_INSIDE(at=_at(op)), _NEAR)
    if op.mode.autocast != mode.autocast:
        raise Rejection(reasons.AUTOCAST_INSIDE(at=_at(op)), _NEAR)


def around(subgraph: Subgraph, tail: Tail | None) -> Iterator[Op]:
    """The operations that the rewrite does anew in the subgraph's place."""
    lifted = [live_in for live_in in subgraph.live_ins if isinstance(live_in, Lifted)]
    inner = lambda s: (a for a in leaves((s.args, s.kwargs)) if isinstance(a, Lifted))  # noqa: E731
    for current in walk([*lifted, *(() if tail is None else (tail.root,))], inner):
        if current.op is not None:
            yield current.op


def _at(op: Op) -> str:
    line = user_line(op.node.meta)
    return f" at {line}" if line else ""
