"""Memo: layers with the same code are proved once; a problem that is the same program gets the same answer."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from llcompile.patterns.boundary import CannotRun
from llcompile.patterns.records import Certificate
from llcompile.patterns.structure.axes import Dim
from llcompile.patterns.structure.classify import Rejection
from llcompile.patterns.structure.hypothesis import Hypothesis
from llcompile.patterns.structure.lifted import Lifted, sample_of
from llcompile.patterns.structure.nested import mapped
from llcompile.patterns.structure.problem import Problem
from llcompile.patterns.structure.program import Value

# By the fingerprint: a hypothesis of live-ins and dims by name with its certificate, or why it is none.
_answers: dict[Any, tuple[Hypothesis, Certificate] | Rejection] = {}


def fingerprint(problem: Problem) -> str:
    """Equal for two problems that are the same program: operations, numbers, shapes, axes and ranges of live-ins, and
    the same axes as time."""
    subgraph, names = problem.subgraph, dict[Value, Any]()
    for i, live_in in enumerate(subgraph.live_ins):
        if isinstance(live_in, Value):
            names[live_in] = ("source", i)
        else:
            names.update((value, ("source", i, position)) for value, position in subgraph.taps[live_in].items())
    steps = []
    for number, op in enumerate(subgraph.ops):
        args = mapped(lambda a: _named(a, names) if isinstance(a, Value) else a, (op.args, op.kwargs))
        steps.append((str(op.target), repr(args)))
        for i, value in enumerate(op.outputs):
            names.setdefault(value, ("step", number, i))
    dims = _numbers(problem)
    shapes = tuple(
        (
            str(sample_of(s).dtype),
            tuple(tuple((dims[a], a.size, a.weight) for a in axis) for axis in problem.layouts[s]),
            problem.ranges[s],
            s in subgraph.learned,
        )
        for s in subgraph.live_ins
    )
    final = tuple(tuple(dims[a] for a in axis) for axis in problem.result)
    time = tuple((dims.get(a), a.size) for a in problem.frame.leaves)
    text = repr((steps, shapes, final, time, names[subgraph.result], str(subgraph.result.dtype)))
    return hashlib.sha256(text.encode()).hexdigest()


def recall(key: Any, problem: Problem) -> tuple[Hypothesis, Certificate] | None:
    """The answer for this problem, in its own live-ins and dims; None where there is none yet.

    Raises:
        Rejection: the answer was one.
    """
    answer = _answers.get(key)
    if isinstance(answer, Rejection):
        raise answer
    if answer is None:
        return None
    hypothesis, certificate = answer
    found = _renamed(hypothesis, {name: thing for thing, name in _names(problem).items()})
    return replace(found, layouts=problem.layouts, result=problem.result), certificate


def is_lasting(rejection: Rejection) -> bool:
    """Whether the same subgraph will be missed again: not where it did not run, for want of memory perhaps."""
    cause = rejection.__cause__
    return not isinstance(cause.__cause__ if isinstance(cause, CannotRun) else cause, (RuntimeError, MemoryError))


def remember(key: Any, problem: Problem, found: tuple[Hypothesis, Certificate] | Rejection) -> None:
    """Keeps an answer, without the problem's own objects: live-ins and dims by name."""
    if isinstance(found, Rejection):
        _answers[key] = Rejection(found.given, found.near, found.open)
        return
    hypothesis, certificate = found
    _answers[key] = replace(_renamed(hypothesis, _names(problem)), layouts={}, result=()), certificate


def _names(problem: Problem) -> dict[Any, str]:
    """A name for each live-in and dim, the same one in every problem with this fingerprint."""
    return {thing: f"#{number}" for number, thing in enumerate([*problem.subgraph.live_ins, *_numbers(problem)])}


def _renamed(hypothesis: Hypothesis, table: Mapping[Any, Any]) -> Hypothesis:
    """The hypothesis with other things in the places of live-ins and dims."""
    own = (Dim, Value, Lifted)
    other = lambda thing: table[thing] if thing in table or isinstance(thing, own) else thing  # noqa: E731
    found = {name: mapped(other, given) for name, given in vars(hypothesis).items()}
    axes = {name: mapped(other, axis) for name, axis in vars(hypothesis.axes).items()}
    return replace(hypothesis, **{**found, "axes": replace(hypothesis.axes, **axes)})


def _numbers(problem: Problem) -> dict[Dim, int]:
    """The dims, each with a number: its place."""
    axes = [*(axis for s in problem.subgraph.live_ins for axis in problem.layouts[s]), *problem.result]
    return {dim: number for number, dim in enumerate(dict.fromkeys(dim for axis in axes for dim in axis))}


def _named(value: Value, names: dict[Value, Any]) -> Any:
    if value not in names:
        names[value] = ("number", *_digest(value.data)) if value.data is not None else ("unknown", id(value))
    return names[value]


def _digest(data: torch.Tensor) -> tuple[Any, ...]:
    numbers = data.detach().cpu().contiguous()
    raw = numbers.flatten().view(torch.uint8) if numbers.numel() else numbers
    return tuple(numbers.shape), str(numbers.dtype), hashlib.sha256(raw.numpy().tobytes()).hexdigest()
