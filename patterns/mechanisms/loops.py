"""Token loops, unrolled by the trace or the recording: one line again and again, each time fed by the time before.

The steps of a loop share their stack trace, so that candidates are values with one trace, operation and shape. A chain
from the first to the second and third makes them a recurrence over something; that it runs over the sequence is told
by what it reads: one position further with each step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from llcompile.patterns.mechanisms.facts import Facts, node_of
from llcompile.patterns.mechanisms.found import Found
from llcompile.patterns.mechanisms.recurrences import Recurrence, name_of
from llcompile.patterns.mechanisms.vocabulary import READS
from llcompile.patterns.structure.nested import mapped
from llcompile.patterns.structure.program import Value

# Fewer steps are no loop.
_STEPS = 3
# One line may run an operation this often in a step (`h = f * h + i * g` multiplies twice).
_SAME = 4
# The largest body of a loop that is looked into, and how far above it reads of the sequence are looked for.
_BODY, _REACH = 400, 96


def find(facts: Facts) -> Iterator[Found]:
    """Every unrolled recurrence over the sequence."""
    covered: set[Value] = set()
    for group in _groups(facts):
        if group[0] in covered or group[1] in covered:
            continue
        steps = _chain(facts, group)
        if steps is None:
            continue
        first, second = (_between(facts, steps[i], steps[i + 1]) for i in (0, 1))
        if not _reads_on(facts, steps, (first, second)):
            continue
        covered.update(steps, first, second)
        reads = tuple(v for v in first if any(u not in first and u not in second for u in facts.users(v)))
        kind = name_of(facts, Recurrence(steps[0], steps[1], first, reads))
        if kind:
            yield Found(node_of(steps[1]), kind, frozenset((*first, *second, *group)))


def _groups(facts: Facts) -> Iterator[list[Value]]:
    """Values of one shape that one operation on one line made."""
    groups: dict[Any, list[Value]] = {}
    for value in facts.values:
        computed = value in facts.activations and value.op is not None and facts.names[value] not in READS
        if computed and facts.size(value) > 1:
            meta = node_of(value).meta
            module = next(reversed(meta.get("nn_module_stack") or {"": ""})).split("@")[0]
            key = (module, meta.get("stack_trace"), facts.names[value], value.shape)
            groups.setdefault(key, []).append(value)
    yield from (group for group in groups.values() if len(group) >= _STEPS)


def _chain(facts: Facts, group: Sequence[Value]) -> tuple[Value, Value, Value] | None:
    """Three values of which each feeds the next one, one step apart."""
    for apart in range(1, _SAME + 1):
        if len(group) > 2 * apart and _between(facts, group[0], group[apart]):
            steps = group[0], group[apart], group[2 * apart]
            if _between(facts, steps[1], steps[2]):
                return steps
    return None


def _between(facts: Facts, first: Value, second: Value) -> frozenset[Value]:
    """The values on the ways from the first to the second, which is one of them; none where no way leads there."""
    after = facts.position[first]
    if facts.position[second] - after > 4 * _BODY:
        return frozenset()
    above = [v for v in facts.above(second, lambda v: facts.position[v] <= after, _BODY) if facts.position[v] > after]
    reached = {first}
    for value in sorted(above, key=facts.position.__getitem__):
        if not reached.isdisjoint(facts.inputs(value)):
            reached.add(value)
    return frozenset(reached - {first}) if second in reached else frozenset()


def _reads_on(facts: Facts, steps: Sequence[Value], carried: Sequence[frozenset[Value]]) -> bool:
    """Whether both steps read a tensor from before the loop, and the second one at other places of it."""
    first, second = (_reads(facts, steps, i, inner) for i, inner in enumerate(carried))
    return any(second.get(key, places) != places for key, places in first.items())


def _reads(facts: Facts, steps: Sequence[Value], number: int, carried: frozenset[Value]) -> dict[Any, set[Any]]:
    """What is read at fixed places on the way into a step: (tensor, kind of reading) -> places."""
    start, after = facts.position[steps[0]], facts.position[steps[number]]
    body = facts.position[steps[1]] - start
    # Of a step before this one.
    earlier = lambda v: start - body < facts.position[v] <= after  # noqa: E731
    found: dict[Any, set[Any]] = {}
    inputs = {v for value in carried for v in facts.inputs(value) if v not in carried and v is not steps[number]}
    for value in inputs & facts.activations:
        if earlier(value) and facts.names[value] not in READS:
            continue
        for v in facts.above(value, lambda v: v in carried or earlier(v), _REACH):
            if facts.names[v] in READS and facts.position[facts.inputs(v)[0]] < start:
                kind, places = _places(v)
                found.setdefault((facts.inputs(v)[0], kind), set()).add(places)
    return found


def _places(read: Value) -> tuple[Any, tuple[int, ...]]:
    """The numbers in a reading's arguments, and the rest of them."""
    assert read.op is not None
    places = [read.index]

    def split(argument: Any) -> Any:
        if isinstance(argument, int) and not isinstance(argument, bool):
            places.append(argument)
            return "place"
        return str(argument)

    kind = (read.op.target, str(mapped(split, (read.op.args[1:], read.op.kwargs))))
    return kind, tuple(places)
