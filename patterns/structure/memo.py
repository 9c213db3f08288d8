"""Memo: layers with the same code are proved once; a problem that is the same program gets the same answer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from llcompile.patterns.boundary import CannotRun
from llcompile.patterns.records import Certificate
from llcompile.patterns.structure.axes import Dim
from llcompile.patterns.structure.classify import Rejection
from llcompile.patterns.structure.hypothesis import Hypothesis
from llcompile.patterns.structure.lifted import sample_of
from llcompile.patterns.structure.nested import mapped
from llcompile.patterns.structure.problem import Problem
from llcompile.patterns.structure.program import Value

# By the fingerprint: a hypothesis of live-ins and dims by number with its certificate, or why it is none.
_answers: dict[Any, tuple[Hypothesis, Certificate] | Rejection] = {}


def fingerprint(problem: Problem) -> str:
    """Equal for two problems that are the same program: operations, numbers, shapes, axes and ranges of live-ins."""
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
    text = repr((steps, shapes, final, names[subgraph.result], str(subgraph.result.dtype)))
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
    dims = list(_numbers(problem))
    found = _mapped(hypothesis, problem.subgraph.live_ins.__getitem__, dims.__getitem__)
    return replace(found, layouts=problem.layouts, result=problem.result), certificate


def is_lasting(rejection: Rejection) -> bool:
    """Whether the same subgraph will be missed again: not where it did not run, for want of memory perhaps."""
    cause = rejection.__cause__
    return not isinstance(cause.__cause__ if isinstance(cause, CannotRun) else cause, (RuntimeError, MemoryError))


def remember(key: Any, problem: Problem, found: tuple[Hypothesis, Certificate] | Rejection) -> None:
    """Keeps an answer, without the problem's own objects: live-ins and dims by number."""
    if isinstance(found, Rejection):
        _answers[key] = Rejection(found.given, found.near, found.open)
        return
    hypothesis, certificate = found
    places = {live_in: i for i, live_in in enumerate(problem.subgraph.live_ins)}
    numbered = _mapped(hypothesis, places.__getitem__, _numbers(problem).__getitem__)
    _answers[key] = replace(numbered, layouts={}, result=()), certificate


def _mapped(hypothesis: Hypothesis, live_in: Callable[[Any], Any], dim: Callable[[Any], Any]) -> Hypothesis:
    """The hypothesis with other live-ins and dims."""
    one = lambda s: None if s is None else live_in(s)  # noqa: E731
    axes = {name: tuple(map(dim, axis)) for name, axis in vars(hypothesis.axes).items()}
    return replace(
        hypothesis,
        axes=replace(hypothesis.axes, **axes),
        query=live_in(hypothesis.query),
        key=live_in(hypothesis.key),
        value=one(hypothesis.value),
        factors=tuple((live_in(s), how) for s, how in hypothesis.factors),
        decay=one(hypothesis.decay),
        beta=one(hypothesis.beta),
        post=tuple((live_in(s), how) for s, how in hypothesis.post),
        first=one(hypothesis.first),
        skip=None if hypothesis.skip is None else tuple(map(live_in, hypothesis.skip)),
    )


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
