"""Token loops that the trace unrolled: the same line of code again and again, each time fed by the time before.

The steps of a loop share their stack trace, so that candidates are nodes with one trace, operation and shape. A chain
from the first to the second and third makes them a recurrence over something; that it runs over the sequence is told
by what it reads: one position further with each step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import fx

from llcompile.patterns.mechanisms.axes import TimeAxes
from llcompile.patterns.mechanisms.facts import Facts
from llcompile.patterns.mechanisms.found import Found
from llcompile.patterns.mechanisms.recurrences import Recurrence, name_of
from llcompile.patterns.mechanisms.vocabulary import READS

# Fewer steps are no loop.
_STEPS = 3
# One line may run an operation this often in a step (`h = f * h + i * g` multiplies twice).
_SAME = 4
# The largest body of a loop that is looked into, and how far above it reads of the sequence are looked for.
_BODY, _REACH = 400, 48


def find(facts: Facts, axes: TimeAxes) -> Iterator[Found]:
    """Every unrolled recurrence over the sequence."""
    covered: set[fx.Node] = set()
    for group in _groups(facts):
        if group[0] in covered or group[1] in covered:
            continue
        steps = _chain(facts, group)
        if steps is None:
            continue
        first, second = (_between(facts, steps[i], steps[i + 1]) for i in (0, 1))
        covered.update(steps, first, second)
        if not _reads_on(facts, steps, (first, second)):
            continue
        outside = tuple(n for n in first if any(u not in first and u not in second for u in facts.users[n]))
        step = Recurrence(steps[0], steps[1], first, outside, emitted=bool(outside))
        kind = name_of(facts, step)
        if kind:
            yield Found(steps[1], kind, inside=frozenset((*first, *second, *group)))


def _groups(facts: Facts) -> Iterator[list[fx.Node]]:
    """Nodes that one operation on one line made of tensors of one shape."""
    groups: dict[Any, list[fx.Node]] = {}
    for node in facts.nodes:
        computed = node in facts.activations and node.op != "placeholder" and not _is_read(facts, node)
        if computed and facts.size(node) > 1:
            module = next(reversed(node.meta.get("nn_module_stack") or {"": ""})).split("@")[0]
            key = (module, node.meta.get("stack_trace"), facts.names[node], facts.shapes[node])
            groups.setdefault(key, []).append(node)
    yield from (group for group in groups.values() if len(group) >= _STEPS)


def _is_read(facts: Facts, node: fx.Node) -> bool:
    """Whether the node takes a part of a tensor; an item of what a cell of torch returns is a state."""
    return facts.names[node] in READS and not facts.names[facts.inputs[node][0]].endswith("cell")


def _chain(facts: Facts, group: Sequence[fx.Node]) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """Three nodes of which each feeds the next one, one step apart."""
    for apart in range(1, _SAME + 1):
        if len(group) > 2 * apart and _feeds(facts, group[0], group[apart]):
            steps = group[0], group[apart], group[2 * apart]
            if _feeds(facts, steps[1], steps[2]):
                return steps
    return None


def _feeds(facts: Facts, first: fx.Node, second: fx.Node) -> bool:
    after = facts.position[first]
    if facts.position[second] - after > 4 * _BODY:
        return False
    earlier = lambda n: facts.position[n] <= after  # noqa: E731
    return any(n is first for n in facts.above(second, earlier, _BODY))


def _between(facts: Facts, first: fx.Node, second: fx.Node) -> frozenset[fx.Node]:
    """The nodes on the ways from the first to the second, which is one of them."""
    after = facts.position[first]
    above = [n for n in facts.above(second, lambda n: facts.position[n] <= after, _BODY) if facts.position[n] > after]
    reached = {first}
    for node in sorted(above, key=facts.position.__getitem__):
        if not reached.isdisjoint(facts.inputs[node]):
            reached.add(node)
    return frozenset(reached - {first})


def _reads_on(facts: Facts, steps: Sequence[fx.Node], carried: Sequence[frozenset[fx.Node]]) -> bool:
    """Whether both steps read a tensor from before the loop, and the second one at other places of it."""
    first, second = (_reads(facts, steps, i, inner) for i, inner in enumerate(carried))
    return any(second.get(key, places) != places for key, places in first.items())


def _reads(facts: Facts, steps: Sequence[fx.Node], number: int, carried: frozenset[fx.Node]) -> dict[Any, set[Any]]:
    """What is read at fixed places on the way into a step: (tensor, kind of reading) -> places."""
    start, after = facts.position[steps[0]], facts.position[steps[number]]
    body = facts.position[steps[1]] - start

    def earlier(node: fx.Node) -> bool:  # of a step before this one
        return start - body < facts.position[node] <= after

    found: dict[Any, set[Any]] = {}
    inputs = {n for node in carried for n in facts.inputs[node] if n not in carried and n is not steps[number]}
    for node in inputs & facts.activations:
        if earlier(node) and not _is_read(facts, node):
            continue
        for n in facts.above(node, lambda n: n in carried or earlier(n), _REACH):
            if _is_read(facts, n) and isinstance(n.args[0], fx.Node) and facts.position[n.args[0]] < start:
                kind, places = _places(n)
                if places:
                    found.setdefault((n.args[0], kind), set()).add(places)
    return found


def _places(read: fx.Node) -> tuple[Any, tuple[int, ...]]:
    """The numbers in a reading's arguments, and the rest of them."""
    places: list[int] = []

    def split(value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            places.append(value)
            return "place"
        if isinstance(value, slice):
            return ("slice", split(value.start), split(value.stop), split(value.step))
        return tuple(split(v) for v in value) if isinstance(value, (tuple, list)) else str(value)

    kind = (str(read.target), split(read.args[1:]), split(sorted(read.kwargs.items())))
    return kind, tuple(places)
