"""Found: what a search of a graph comes back with, mixers and near misses."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from llcompile.patterns.graph.walk import walk
from llcompile.patterns.reasons import GivenReason
from llcompile.patterns.records import Certificate
from llcompile.patterns.structure.axes import Axis, length
from llcompile.patterns.structure.classify import Rejection
from llcompile.patterns.structure.cut import Subgraph
from llcompile.patterns.structure.facts import TimeAnalysis
from llcompile.patterns.structure.frame import Frame
from llcompile.patterns.structure.hypothesis import Hypothesis
from llcompile.patterns.structure.lifted import Lifted, LiveIn, made_of, origin, sample_of
from llcompile.patterns.structure.program import Op, Program, Value
from llcompile.patterns.structure.tail import Tail

# Operations that may put tokens in another order.
_REORDERS = frozenset(["flip", "index", "index_select", "gather", "take", "take_along_dim", "sort"])
# By whether the call is given the decay.
_ASSUMED = {
    False: "its decay is a plain parameter: every call checks that it is in (0, 1]",
    True: "its decay is an argument: every call checks that it is in (0, 1]",
}


@dataclass(eq=False)
class Found:
    """A mixer in a graph."""

    subgraph: Subgraph
    hypothesis: Hypothesis
    certificate: Certificate
    frame: Frame
    analysis: TimeAnalysis
    program: Program
    tail: Tail | None = None
    fixed: GivenReason | None = None  # why it is known at the graph's own length only
    held: bool = True  # whether that length could be made the only one of the graph
    full: bool = False  # its keys are products that hold values: the inputs of a state, as of a selective scan

    @property
    def output(self) -> Value:
        """The value of the program that is the subgraph's result, or is computed from it piece by piece."""
        return self.subgraph.result if self.tail is None else self.tail.output

    @property
    def ops(self) -> list[Op]:
        """The operations that the mixer stands for."""
        return [*self.subgraph.ops, *(self.tail.ops if self.tail is not None else ())]

    @property
    def anchor(self) -> fx.Node:
        """The node that makes the output."""
        return anchor(self.output)

    @property
    def batch_and_time(self) -> tuple[int, int] | None:
        """How many rows and tokens it has; None where the code pads or cuts its time, or puts it in another order."""
        if self.analysis.shorter != self.analysis.leaves or self.order != self.analysis.leaves or self._reordered:
            return None
        batch, time = self.hypothesis.axes.batch, self.analysis.leaves
        return length(batch), length(time)

    @functools.cached_property
    def order(self) -> Axis:
        """Time in the order in which the queries have it: that of a grid's columns, say, where the input has rows."""
        value = next(v for v in values_of(self.hypothesis.query) if self.analysis.facts[v].data)
        found = tuple(leaf for axis in self.analysis.axes(value) for leaf in axis if self.analysis.is_time(leaf))
        return found if len(found) == len(self.analysis.leaves) else self.analysis.leaves

    @functools.cached_property
    def _straight(self) -> tuple[set[Value], bool]:
        """What the queries are computed from with all tokens in their order; whether anything changes that order."""
        reorders = lambda op: op.name in _REORDERS and self.analysis.mixes_time(op)  # noqa: E731
        above = lambda v: () if v.op is None or reorders(v.op) else v.op.inputs  # noqa: E731
        straight = set(walk(values_of(self.hypothesis.query), above))
        return straight, any(v.op is not None and reorders(v.op) for v in straight)

    @property
    def _reordered(self) -> bool:
        return self._straight[1]

    @property
    def rows_and_tokens(self) -> tuple[int, int]:
        """How many rows and tokens come in: time is as it was before it was padded."""
        batch, time = self.hypothesis.axes.batch, self.analysis.shorter
        return length(batch), length(time)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Heads, groups, key width, value width."""
        axes = self.hypothesis.axes
        return length(axes.heads), length(axes.groups), length(axes.key), length(axes.value)

    @property
    def is_selective(self) -> bool:
        """Whether it is Mamba-1's scan: heads of width one with rates per channel."""
        return self.hypothesis.rates is not None and self.sizes[3] == 1

    @property
    def spreads_rates(self) -> bool:
        """Whether it has a decay of its own for each token, channel and state: a later cut may show steps and rates."""
        return (
            self.sizes[3] == 1 < self.sizes[0]
            and self.hypothesis.rates is None
            and self.hypothesis.family[0] == "channel"
        )

    def notes(self) -> tuple[str, ...]:
        """What holds for this graph only, in words."""
        found = []
        if any(leaf.pinned for leaf in self.frame.leaves):
            found.append(f"its code is unrolled for length {length(self.frame.leaves)}")
        if self.hypothesis.constant is not None:
            found.append("its decay is constant, and was read when it was compiled")
        if self.hypothesis.step is not None:
            found.append(f"its step (beta) is a constant, {self.hypothesis.step:.6g}")
        if self.hypothesis.assumed:
            found.append(_ASSUMED[self._is_given(self.hypothesis.decay)])
        if self.hands_on():
            found.append("it returns the sum of its levels as its state; a call that receives such a state is refused")
        return tuple(found)

    def _is_given(self, live_in: LiveIn | None) -> bool:
        return live_in is not None and self.analysis.facts[sample_of(live_in)].data

    def hands_on(self) -> bool:
        """Whether the graph returns a state, or writes one away: what else the operands become, summed over time.

        By its size: a number for each row, head, key and value feature. Nothing is decided by it.
        """
        operands = [value for live_in in self.hypothesis.operands for value in values_of(live_in)]
        ends = {self.subgraph.result, self.output}
        below = walk(operands, lambda v: (o for user in v.users for o in user.outputs if o not in ends))
        size = self.rows_and_tokens[0] * self.sizes[0] * self.sizes[2] * self.sizes[3]
        made = set(below).difference(operands)
        states = {v for v in made if self.analysis.facts[v].form != "sequence" and math.prod(v.shape) == size}
        nodes = (node for node, held in self.program.results.items() if held in states)
        return any(user.op == "output" or user.target == "copy_" for node in nodes for user in node.users)

    def takes_state(self) -> bool:
        """Whether the queries also read a linear state that came in: an input without time, of a state's size."""
        size = self.rows_and_tokens[0] * self.sizes[0] * self.sizes[2] * self.sizes[3]
        facts = self.analysis.facts
        given = [v for v in self.program.inputs if v in facts and facts[v].data and facts[v].form == "timeless"]
        states = self._made_of([v for v in given if v.dtype.is_floating_point and math.prod(v.shape) == size])
        queries = self._made_of(values_of(self.hypothesis.query))
        readers = {op for value in states for op in value.users}
        return any(queries.intersection(op.inputs) - states for op in readers)

    def _made_of(self, values: list[Value]) -> set[Value]:
        """The values, and what is made of them token by token."""
        facts = self.analysis.facts
        return set(walk(values, lambda v: (o for op in v.users for o in op.outputs if not facts[o].mixed)))

    def activations(self) -> list[fx.Node]:
        """The nodes of the operands that depend on the model's input."""
        return self.nodes_of(*self.hypothesis.operands)

    def nodes_of(self, *live_ins: LiveIn) -> list[fx.Node]:
        """The nodes that live-ins are made of and that depend on the model's input."""
        found: list[fx.Node] = []
        pending = list(live_ins)
        while pending:
            live_in = pending.pop()
            if isinstance(live_in, Lifted):
                pending.extend([live_in.base[0]] if live_in.base is not None else made_of(live_in))
            elif self.analysis.facts[live_in].data and live_in.node is not None:
                found.append(live_in.node)
        return list(dict.fromkeys(found))

    def batch_first(self, node: fx.Node) -> tuple[int, int] | None:
        """(batch, time) dimensions of a node [B, T, D] or [T, B, D]; batch is -1 for [T, D]; None for others."""
        value = self.program.results.get(node)
        if value is None or value not in self.analysis.facts or not value.dtype.is_floating_point:
            return None
        fact = self.analysis.facts[value]
        axes = self.analysis.axes(value)
        wanted = {self.order, self.analysis.shorter} if self.order == self.analysis.leaves else {self.order}
        inside = [i for i, axis in enumerate(axes) if axis in wanted]
        if value not in self._straight[0]:
            return None
        if (fact.form != "sequence" and self.analysis.shorter not in axes) or not fact.data or len(inside) != 1:
            return None
        batch = length(self.hypothesis.axes.batch)
        if len(axes) == 2 and inside == [0] and batch == 1:
            return -1, 0
        if len(axes) == 3 and inside[0] < 2 and value.shape[1 - inside[0]] == batch:
            return 1 - inside[0], inside[0]
        return None

    def is_shorter(self, node: fx.Node) -> bool:
        """Whether a node has time as it was before it was padded."""
        axes = self.analysis.axes(self.program.results[node])
        return self.analysis.shorter != self.analysis.leaves and self.analysis.shorter in axes


@dataclass(eq=False)
class NearMiss:
    """A value that looked like a mixer's output and is not.

    Args:
        value: the value.
        rejection: why it is none.
        subgraph: what was tried, the last time.
        why: says more exactly why, at some cost.
        analysis: what was taken as time.
    """

    value: Value
    rejection: Rejection
    subgraph: Subgraph | None = None
    why: Callable[[], Rejection] | None = None
    analysis: TimeAnalysis | None = None

    @property
    def axis(self) -> Axis:
        """The axis that was taken as time, before it was padded."""
        return () if self.analysis is None else self.analysis.shorter

    @functools.cached_property
    def origins(self) -> frozenset[object]:
        """What it is computed from; the pieces of one sequence are that sequence."""
        live_ins = self.value.op.inputs if self.subgraph is None and self.value.op is not None else []
        return frozenset(map(origin, live_ins if self.subgraph is None else self.subgraph.live_ins))

    def lost(self) -> Value | None:
        """A buffer without numbers that one of its operands is made of, apart from the model's input."""
        for live_in in () if self.subgraph is None else self.subgraph.live_ins:
            above = walk(values_of(live_in), lambda v: () if v.op is None else v.op.inputs)
            inputs = [v for v in above if v.op is None]
            if all(v.lost or v.parameter for v in inputs):
                found = next((v for v in inputs if v.lost), None)
                if found is not None:
                    return found
        return None

    def is_inside(self, other: NearMiss) -> bool:
        """Whether the value is computed inside of what another one is computed from."""
        return other.subgraph is not None and self.value.op in other.subgraph.ops

    def is_more_than(self, inner: list[NearMiss]) -> bool:
        """Whether something mixes times that is in none of those inside; else what follows is done token by token."""
        analysis, known = (
            self.analysis,
            {op for missed in inner if missed.subgraph is not None for op in missed.subgraph.ops},
        )
        if self.subgraph is None or analysis is None:
            return False
        behind = set(self.subgraph.ops) - known
        return any(op in analysis.followed.mixed and analysis.mixes_time(op) for op in behind)

    @property
    def anchor(self) -> fx.Node:
        """The node that makes the value."""
        return anchor(self.value)


# The most that a search of one graph may take: so many steps, and so many more for each of its operations. Layers that
# are alike are proved once.
BOUNDS = {"cuts": (2000, 8.0), "proofs": (400, 0.5)}


@dataclass
class Findings:
    """What was found in one graph.

    Args:
        program: the graph as a program.
        found: the mixers.
        denominators: id of a mixer -> the subgraphs that sum its scores alone, for a normalisation in the code.
        near_misses: the near misses, the nearest of each cluster.
        failed: fingerprint of a subgraph that did not run -> its rejection in this look; another may have the memory.
        one: what runs over one position, where the example has one token and shows no mixing.
        counts: uses of each axis rule, and of each step here.
        proving: seconds that the proofs took.
        stopped: where the search ended because it had taken too many steps; what comes after was not looked at.
    """

    program: Program
    found: list[Found] = field(default_factory=list)
    near_misses: list[NearMiss] = field(default_factory=list)
    failed: dict[Any, Rejection] = field(default_factory=dict)
    denominators: dict[int, list[Found]] = field(default_factory=dict)
    one: Op | None = None
    counts: Counter[str] = field(default_factory=Counter)
    proving: float = 0.0
    stopped: Value | None = None

    def is_spent(self) -> bool:
        """Whether the search has taken as many steps as a program of this size may cost."""
        operations = len(self.program.ops)
        return any(self.counts[step] >= least + each * operations for step, (least, each) in BOUNDS.items())


def anchor(value: Value) -> fx.Node:
    """The node that makes a value."""
    node = value.node if value.node is not None else value.op.node if value.op is not None else None
    assert node is not None
    return node


def values_of(live_in: LiveIn) -> list[Value]:
    """The values that a live-in is, or is assembled from."""
    if not isinstance(live_in, Lifted):
        return [live_in]
    inner = [*made_of(live_in), *(live_in.base or ())[:1]]
    return [value for one in inner for value in values_of(one)]
