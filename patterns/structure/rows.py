"""Rows: what a token loop carries from token to token and that is no state: stabilisers, gates scaled by them, sums.

Such a value is made from the tokens so far, so that a row of them, one for each token, may be an operand: its own
operations stay in the graph. Which values make a row is read off how the loop is unrolled: the same operation, the same
place among its kind at each token. Whatever is taken for a row, the value at a token has seen no later one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from llcompile.patterns.structure.axes import length
from llcompile.patterns.structure.facts import Fact, TimeAnalysis
from llcompile.patterns.structure.joins import Pieces, row_of
from llcompile.patterns.structure.moves import CUTS, MOVES
from llcompile.patterns.structure.program import Op, Row, Value

# What sums up: a value that these make may be a state, the sum of keys in a denominator.
STATES = frozenset(["add", "sub", "rsub", "mul", "div", "addcmul", "addcdiv", "lerp", "sum"])


class Rows:
    """The rows of a program, for operands that may mix tokens.

    Args:
        analysis: the facts.
        position: the token that was taken out of a sequence; None for more than one.
    """

    def __init__(self, analysis: TimeAnalysis, position: Callable[[Value], int | None]) -> None:
        self.analysis, self._alone = analysis, position
        self.length = length(analysis.leaves)
        self._done = 0
        self._at: dict[Value, int] = {}  # the last token that a value is made from
        self._carried: set[Value] = set()
        self._keys: dict[Value, Any] = {}
        self._rows: dict[Any, dict[int, Value]] = {}
        self._counts: Counter[Any] = Counter()
        self._made: dict[Any, Row | None] = {}

    def of(self, value: Value) -> tuple[Row, int] | None:
        """The row that a value is in and its place; None where the loop carries nothing there."""
        self._advance()
        key = self._keys.get(value)
        if key is None:
            return None
        if key not in self._made:
            self._made[key] = self._row(self._rows[key])
        row = self._made[key]
        return None if row is None else (row, self._at[value])

    def is_sum(self, row: Row) -> bool:
        """Whether it may be a state."""
        last = row.op.inputs[-1].op if row.op is not None else None
        return last is not None and last.name in STATES

    def is_carried_on(self, pieces: Pieces) -> bool:
        """Whether a row is computed from one at the token before: following it further leads nowhere."""
        last = pieces[-1]
        return last.op is not None and any(self._at.get(v, self.length) < self._at.get(last, 0) for v in last.op.inputs)

    def _row(self, found: dict[int, Value]) -> Row | None:
        if len(found) != self.length or found[self.length - 1] not in self._carried:
            return None
        pieces = tuple(found[at] for at in range(self.length))
        alike = {(v.shape, v.dtype, v.op.mode if v.op is not None else None) for v in pieces}
        moved = pieces[-1].op is None or pieces[-1].op.name in MOVES  # another view of a row
        if len(alike) > 1 or moved or any(v.node is None for v in pieces):
            return None
        row = row_of(pieces, pieces[-1])
        weight = any(self.analysis.facts[v].weight for v in pieces)
        self.analysis.facts[row] = Fact(data=True, weight=weight, form="sequence")
        return row

    def _advance(self) -> None:
        """Goes on through the operations of which the facts are known."""
        ops, facts = self.analysis.program.ops, self.analysis.facts
        while self._done < len(ops) and all(v in facts for v in ops[self._done].outputs):
            self._step(ops[self._done])
            self._done += 1

    def _step(self, op: Op) -> None:
        facts = self.analysis.facts
        if not any(facts[v].data and facts[v].form == "pieces" and not facts[v].mixed for v in op.outputs):
            return
        if op.name in CUTS and facts[op.inputs[0]].form == "sequence":
            self._at.update((v, at) for v in op.outputs if (at := self._alone(v)) is not None)
            return
        given = [v for v in op.inputs if facts[v].data]
        if not given or any(v not in self._at for v in given) or any(facts[v].met for v in op.outputs):
            return
        at = max(self._at[v] for v in given)
        carried = any(self._at[v] < at or v in self._carried for v in given)
        rank = self._counts[op.target, at]
        self._counts[op.target, at] += 1
        for value in op.outputs:
            self._at[value], self._keys[value] = at, (op.target, value.index, rank)
            self._rows.setdefault(self._keys[value], {})[at] = value
            if carried:
                self._carried.add(value)
