"""Positions: whether what is computed from positions alone (masks, decays by distance) is the same at all lengths.

A graph may serve lengths that no draw has. What is known to go on as it began: positions and their differences, a mask
that compares them, exponentials of them and products of these. Everything else (a division of positions by a number, a
power, a bucket) is right at the length of the graph, where the proof has seen it, and says nothing of another one.

Of each value without a live-in above it, its kind:

| kind | |
|---|---|
| number | the same at all positions |
| position | a position, or a difference of two, up to one more or less |
| line | such a thing times numbers |
| bent | a line that a mask or a bound at zero takes a part of |
| mask | of two values, by the sign of a position or difference |
| curve | an exponential of one of these, and products of such |
| (nothing) | anything else |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from llcompile.patterns.boundary import NotKnown, running
from llcompile.patterns.structure.axes import dims_of
from llcompile.patterns.structure.execute import function_of
from llcompile.patterns.structure.found import Found
from llcompile.patterns.structure.grammar import AVERAGES, LOOKUPS, STEPS
from llcompile.patterns.structure.moves import MOVES
from llcompile.patterns.structure.nested import leaves
from llcompile.patterns.structure.program import Op, Value
from llcompile.torch_internals.sizes import size_hint

NUMBER, POSITION, LINE, BENT, MASK, CURVE, UNKNOWN = "number", "position", "line", "bent", "mask", "curve", ""
_LINES = {POSITION, LINE}


class Positions:
    """The values of a mixer that come from no live-in.

    Args:
        found: the mixer.
    """

    def __init__(self, found: Found) -> None:
        self.found, self.frame = found, found.frame
        self.ops = found.subgraph.ops
        self.live_ins = {v for taps in found.subgraph.taps.values() for v in taps}
        self.live_ins |= {s for s in found.subgraph.live_ins if isinstance(s, Value)}
        self.kinds: dict[Value, str] = {}
        for op in self.ops:
            if all(v in self.kinds or self._is_number(v) for v in op.inputs):
                kind = self._kind(op)
                self.kinds.update((v, kind) for v in op.outputs)

    def varying(self) -> Op | None:
        """The first operation that is known at the graph's own length only; None where there is none."""
        for op in self.ops:
            known = all(v in self.kinds for v in op.outputs)
            if UNKNOWN in (self.kinds.get(v, NUMBER) for v in (*op.inputs, *op.outputs)):
                return op
            if not known and (numbers_vary(op) or self._is_average(op) or self._looks_up(op)):
                return op
        return None

    def unseen(self) -> Op | None:
        """The first operation that steps from one value to another, at no position of the graph's length.

        A block, bucket or window that is as long as all of the sequence does nothing here and something further on.
        """
        for op in self.ops:
            unknown = op.outputs[0] in self.kinds and self.kinds[op.outputs[0]] == UNKNOWN
            if unknown and op.name in STEPS and self._is_timed(op.outputs[0]) and self._is_idle(op):
                return op
            if op.name == "slice" and self._shows_corner(op):
                return op
        return None

    def _is_number(self, value: Value) -> bool:
        """Whether it is a tensor of numbers that the code or the model holds."""
        if value.data is None or value in self.live_ins:
            return False
        # A number for each head is no line, though two of them always lie on one.
        one = value.data.numel() == 1 or not self._is_timed(value)
        kind = NUMBER if one else kind_of(value.data)
        self.kinds[value] = UNKNOWN if _is_made_of_sizes(value) else kind
        return True

    def _is_timed(self, value: Value) -> bool:
        return any(map(self.frame.is_time, dims_of(self.frame.axes(value))))

    def _kind(self, op: Op) -> str:
        if numbers_vary(op):
            return UNKNOWN
        timed = any(map(self._is_timed, (op.outputs[0], *op.inputs)))
        if not timed and all(self.kinds[v] == NUMBER for v in op.inputs):
            return NUMBER
        rule = _RULES.get(op.name)
        return UNKNOWN if rule is None else rule(op, [self._given(a) for a in op.args])

    def _given(self, argument: Any) -> str:
        return self.kinds[argument] if isinstance(argument, Value) else NUMBER

    def _is_average(self, op: Op) -> bool:
        mixed = (leaf for axis in self.frame.followed.mixed[op] for leaf in self.frame.axis_leaves(axis))
        return op.name in AVERAGES and any(map(self.frame.is_time, mixed))

    def _looks_up(self, op: Op) -> bool:
        """Whether it reads a table at positions."""
        return op.name in LOOKUPS and any(v in self.kinds and self._is_timed(v) for v in op.inputs)

    def _is_idle(self, op: Op) -> bool:
        """Whether a step is not taken: one value throughout, or what went in."""
        made = self._numbers(op.outputs[0])
        if made is None or made.numel() < 2:
            return False
        if bool((made == made.flatten()[0]).all()):
            return True
        given = [self._numbers(v) for v in op.inputs if v.shape == op.outputs[0].shape]
        if any(g is not None and torch.equal(g.double(), made.double()) for g in given):
            return True
        bounds = [a for a in (*op.args[1:], *op.kwargs.values()) if type(a) in (int, float) and abs(a) > 1]
        return op.name.startswith("clamp") and not all(bool((made == bound).any()) for bound in bounds)

    def _numbers(self, value: Value) -> Tensor | None:
        """A value at the graph's own length."""
        ops = [
            op for op in self.ops if op.outputs[0] in self.kinds and op.number <= (value.op.number if value.op else 0)
        ]
        if value.data is not None:
            return value.data
        if value.op is None:
            return None
        try:
            function = function_of(ops, [], value, None, torch.float64)
            with running(value):
                return function()
        except NotKnown:
            return None

    def _shows_corner(self, op: Op) -> bool:
        """Whether it cuts a corner of a buffer that goes on otherwise than the corner does."""
        base = op.inputs[0]
        if base.data is None or not base.is_read or not self._is_timed(op.outputs[0]):
            return False
        return op.outputs[0].shape != base.shape and kind_of(base.data) == UNKNOWN


def _is_made_of_sizes(value: Value) -> bool:
    """Whether a tensor of numbers was written down with a size in it (`torch.tensor(x.shape[1])`)."""
    return value.node is not None and value.node.op.startswith("call") and bool(symbolic(value.node))


def kind_of(data: Tensor) -> str:
    """The kind of a table of numbers: a causal mask, a mask of decays by distance, positions; or nothing of these."""
    if data.numel() == 1 or (data.dtype == torch.bool and bool(data.all())):
        return NUMBER
    numbers = data.detach().cpu().double().squeeze()
    if numbers.dim() == 1:
        steps = numbers.diff()
        even = bool((steps == steps[0]).all())
        return UNKNOWN if not even else NUMBER if steps[0] == 0 else POSITION if steps[0].abs() == 1 else LINE
    if numbers.dim() < 2 or numbers.shape[-1] != numbers.shape[-2]:
        return UNKNOWN
    return _kind_of_square(numbers)


def _kind_of_square(numbers: Tensor) -> str:
    """[..., L, L]: one number on each diagonal, in the lower or the upper half geometric, nothing in the other."""
    for half in (numbers, numbers.mT):
        column, rest = half[..., :, 0], half[..., 0, 1:]
        outside = rest[..., :1]
        if not bool(torch.isin(rest, torch.tensor([0.0, -math.inf, 1.0])).all()) or not bool((rest == outside).all()):
            continue
        lags = torch.arange(half.shape[-1])[:, None] - torch.arange(half.shape[-1])
        want = torch.where(lags >= 0, column[..., lags.clamp(min=0)], outside[..., None])
        if not torch.equal(want, half):
            continue
        ratio = column[..., 1:2] / column[..., :1]
        powers = column[..., :1] * ratio ** torch.arange(column.shape[-1])
        constant = bool((column == column[..., :1]).all())
        if constant:
            return MASK
        if bool(((powers - column).abs() <= 1e-3 * powers.abs() + 1e-37).all()):
            return CURVE
    return UNKNOWN


def numbers_vary(op: Op) -> bool:
    """Whether a number of the call (and not a size, or a place) follows from a size that varies."""
    sizes = symbolic(op.node)
    if not sizes or not isinstance(op.target, torch._ops.OpOverload):
        return False
    literal = {a for a in leaves((op.node.args, dict(op.node.kwargs))) if type(a) in (int, float, bool)}
    hints = {size_hint(size) for _, size in sizes}
    schema = op.target._schema.arguments
    for position, argument in enumerate(schema):
        given = op.args[position] if position < len(op.args) else op.kwargs.get(argument.name)
        if op.name == "arange" and argument.name == "end" and given == op.outputs[0].shape[0]:
            continue  # as many as there are
        numeric = type(given) in (int, float) and str(argument.type) in _NUMBERS
        if numeric and given != argument.default_value and (given in hints or given not in {*literal, 0, 1}):
            return True
    return False


_NUMBERS = (
    "Tensor",
    "Optional[Tensor]",
    "number",
    "float",
    "Optional[number]",
    "Optional[float]",
    "Scalar",
    "Optional[Scalar]",
)


def symbolic(node: fx.Node) -> list[tuple[fx.Node, Any]]:
    """The arguments of a node that are sizes, or follow from sizes, which vary from call to call."""
    found = [(n, n.meta.get("example_value")) for n in node.all_input_nodes]
    return [(n, size) for n, size in found if isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool))]


# -- rules: from the kinds of a call's arguments to that of its result

_Rule = Callable[[Op, Sequence[str]], str]


def _kinds(kinds: Sequence[str]) -> set[str]:
    return set(kinds) - {NUMBER}


def _range(op: Op, kinds: Sequence[str]) -> str:
    numbers = [a for a in op.args if type(a) in (int, float)]
    return POSITION if len(numbers) < 3 or abs(numbers[2]) == 1 else LINE


def _sum(op: Op, kinds: Sequence[str]) -> str:
    found, scaled = _kinds(kinds[:2]), "alpha" in op.kwargs
    if not found:
        return NUMBER
    if found <= _LINES:
        small = all(abs(a) <= 1 for a in op.args if type(a) in (int, float))
        tensors = all(k == POSITION for a, k in zip(op.args, kinds, strict=False) if isinstance(a, Value))
        return POSITION if small and tensors and not scaled else LINE
    if found == {MASK}:
        return MASK if len([k for k in kinds[:2] if k == MASK]) == 1 else UNKNOWN
    return BENT if found <= {*_LINES, MASK, BENT} else UNKNOWN


def _product(op: Op, kinds: Sequence[str]) -> str:
    found = _kinds(kinds[:2])
    if UNKNOWN in found:
        return UNKNOWN
    one = next(iter(found), NUMBER)
    if len(found) < 2:
        twice = len([k for k in kinds[:2] if k == one]) == 2 and one in (POSITION, LINE, BENT)
        return UNKNOWN if twice else LINE if one == POSITION else one
    if MASK in found and len(found) == 2:
        other = next(k for k in found if k != MASK)
        return BENT if other in _LINES else other
    return UNKNOWN


def _quotient(op: Op, kinds: Sequence[str]) -> str:
    return _product(op, kinds) if len(kinds) > 1 and kinds[1] in (NUMBER, CURVE) and not op.kwargs else UNKNOWN


def _comparison(op: Op, kinds: Sequence[str]) -> str:
    found = _kinds(kinds[:2])
    if len(op.inputs) == 2 and op.inputs[0] is op.inputs[1]:
        return NUMBER  # asks for what is not a number
    if found == {POSITION} or found == {MASK} or not found:
        small = all(abs(a) <= 1 for a in op.args if type(a) in (int, float))
        tensors = [k for a, k in zip(op.args, kinds, strict=False) if isinstance(a, Value)]
        fine = not found or (small and (found == {MASK} or NUMBER not in tensors))
        return (MASK if found else NUMBER) if fine else UNKNOWN
    return UNKNOWN


def _logic(op: Op, kinds: Sequence[str]) -> str:
    found = _kinds(kinds)
    return NUMBER if not found else MASK if found == {MASK} else UNKNOWN


def _choice(op: Op, kinds: Sequence[str]) -> str:
    mask, *others = kinds[:3] if op.name == "where" else (kinds[1], kinds[0], *kinds[2:3])
    found = _kinds(others)
    if mask not in (MASK, NUMBER) or UNKNOWN in found:
        return UNKNOWN
    if not found:
        return MASK
    return BENT if found <= {*_LINES, BENT} else next(iter(found)) if len(found) == 1 else UNKNOWN


def _triangle(op: Op, kinds: Sequence[str]) -> str:
    diagonal = op.args[1] if len(op.args) > 1 else op.kwargs.get("diagonal", 0)
    if abs(diagonal) > 1:
        return UNKNOWN
    return {NUMBER: MASK, MASK: MASK, POSITION: BENT, LINE: BENT, BENT: BENT}.get(kinds[0], kinds[0])


def _bound(op: Op, kinds: Sequence[str]) -> str:
    """A bound at zero (`clamp(min=0)`, relu, abs), or at one position more or less."""
    numbers = [a for a in (*op.args[1:], *op.kwargs.values()) if a is not None]
    if any(type(a) not in (int, float) for a in numbers):
        return UNKNOWN
    exact = all(a == 0 for a in numbers)
    if kinds[0] in (POSITION, MASK, NUMBER) and all(abs(a) <= 1 for a in numbers):
        return BENT if kinds[0] == POSITION else kinds[0]
    return BENT if kinds[0] in (LINE, BENT) and exact else UNKNOWN


def _exponential(op: Op, kinds: Sequence[str]) -> str:
    if kinds[0] == UNKNOWN or kinds[0] == CURVE:
        return UNKNOWN
    return kinds[0] if kinds[0] in (NUMBER, MASK) else CURVE


def _power(op: Op, kinds: Sequence[str]) -> str:
    if len(kinds) < 2 or kinds[0] != NUMBER:
        return UNKNOWN
    return _exponential(op, kinds[1:])


def _cast(op: Op, kinds: Sequence[str]) -> str:
    """Another dtype; whole numbers of what is none, and truth values of what has more than two, are steps."""
    dtype, given = op.outputs[0].dtype, op.inputs[0].dtype
    exact = (
        dtype.is_floating_point or kinds[0] in (MASK, NUMBER) or (dtype != torch.bool and not given.is_floating_point)
    )
    return kinds[0] if exact else UNKNOWN


def _cut(op: Op, kinds: Sequence[str]) -> str:
    """A corner of a table that goes on as it began."""
    start = op.args[2] if len(op.args) > 2 else 0
    step = op.args[4] if len(op.args) > 4 else 1
    return kinds[0] if start in (0, None) and step == 1 else UNKNOWN


_RULES: Mapping[str, _Rule] = {
    **dict.fromkeys([*MOVES, "detach", "neg", "lift_fresh_copy"], lambda op, kinds: kinds[0]),
    **dict.fromkeys(
        ["ones", "zeros", "full", "scalar_tensor", "new_zeros", "new_ones", "new_full", "empty"],
        lambda op, kinds: NUMBER,
    ),
    **dict.fromkeys(["add", "sub", "rsub"], _sum),
    **dict.fromkeys(["lt", "le", "gt", "ge", "eq", "ne"], _comparison),
    **dict.fromkeys(
        ["logical_and", "logical_or", "logical_not", "logical_xor", "bitwise_and", "bitwise_or", "bitwise_not"], _logic
    ),
    **dict.fromkeys(["where", "masked_fill"], _choice),
    **dict.fromkeys(["tril", "triu"], _triangle),
    **dict.fromkeys(["clamp", "clamp_min", "clamp_max", "relu", "abs"], _bound),
    **dict.fromkeys(["exp", "exp2"], _exponential),
    **dict.fromkeys(["log", "sqrt", "sigmoid"], lambda op, kinds: kinds[0] if kinds[0] in (NUMBER, MASK) else UNKNOWN),
    "_to_copy": _cast,
    "arange": _range,
    "mul": _product,
    "div": _quotient,
    "pow": _power,
    "cumsum": lambda op, kinds: LINE if kinds[0] == NUMBER else UNKNOWN,
    "slice": _cut,
    "eye": lambda op, kinds: MASK,
}
