"""One position: what would mix tokens if there were more than one, in a graph whose example has one."""

from __future__ import annotations

from llcompile.patterns.structure.program import Op, Program, Value

_PRODUCTS = ("bmm", "mm", "baddbmm", "addmm")
_TRIANGLES = ("tril", "triu")
_ALONG = ("cumsum", "cumprod", "logcumsumexp", "sum", "_softmax")
_ROWS = ("stack", "cat")  # of one piece: a loop over tokens


def one_position(program: Program) -> Op | None:
    """The first operation on the model's input that runs over one position; None where the input has no such axis."""
    given = [v for v in program.inputs if v.data is None and not v.parameter]
    if not any(_has_one_token(value) for value in given):
        return None
    live = set(given)
    for op in program.ops:
        if not live.isdisjoint(op.inputs):
            if _runs_over_one(op, live):
                return op
            live.update(op.outputs)
    return None


def _has_one_token(value: Value) -> bool:
    """Whether it may be a sequence of one token; an only row of a batch is none."""
    shape = value.shape[1:] if len(value.shape) > 2 or not value.dtype.is_floating_point else value.shape[:-1]
    return 1 in shape


def _runs_over_one(op: Op, live: set[Value]) -> bool:
    if op.name in _PRODUCTS:
        first, second = op.inputs[-2:]
        return first.shape[-1] == 1 and first in live and second in live
    if op.name in _TRIANGLES:
        return op.inputs[0].shape[-2:] == (1, 1)
    if op.name in _ALONG:
        dims = op.args[1] if len(op.args) > 1 else None
        shape = op.inputs[0].shape
        return dims is not None and any(shape[d] == 1 for d in ([dims] if isinstance(dims, int) else dims))
    return op.name in _ROWS and len(op.inputs) == 1
