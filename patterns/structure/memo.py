"""Memo: layers with the same code are read and proved once; a part that is the same program gets the same answer."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from llcompile.patterns.boundary import CannotRun
from llcompile.patterns.records import Certificate
from llcompile.patterns.structure.axes import Axes, Dim
from llcompile.patterns.structure.classify import Rejection
from llcompile.patterns.structure.cut import Subgraph
from llcompile.patterns.structure.hypothesis import Hypothesis
from llcompile.patterns.structure.lifted import LiveIn, sample_of
from llcompile.patterns.structure.nested import mapped
from llcompile.patterns.structure.program import Value
from llcompile.patterns.structure.ranges import Range

Layouts = Mapping[LiveIn, Axes]


@dataclass(frozen=True)
class Answer:
    """What became of a part: a hypothesis of its live-ins and dims by number, or a miss."""

    hypothesis: Hypothesis | None
    certificate: Certificate | None
    rejection: Rejection | None


_answers: dict[Any, Answer] = {}


def fingerprint(subgraph: Subgraph, layouts: Layouts, result: Axes, ranges: Mapping[LiveIn, Range]) -> Any:
    """Equal for two parts that are the same program: operations, numbers, shapes, axes and ranges of the live-ins."""
    names: dict[Value, Any] = {}
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
    dims = _numbers(subgraph.live_ins, layouts, result)
    shapes = tuple(
        (
            str(sample_of(s).dtype),
            tuple(tuple((dims[a], a.size, a.weight) for a in axis) for axis in layouts[s]),
            ranges[s],
            s in subgraph.learned,
        )
        for s in subgraph.live_ins
    )
    final = tuple(tuple(dims[a] for a in axis) for axis in result)
    text = repr((steps, shapes, final, names[subgraph.result], str(subgraph.result.dtype)))
    return hashlib.sha256(text.encode()).hexdigest()


def recall(key: Any, subgraph: Subgraph, layouts: Layouts, result: Axes) -> tuple[Hypothesis, Certificate] | None:
    """The answer for this part, in its own live-ins and dims; None where there is none yet.

    Raises:
        Rejection: the answer was one.
    """
    answer = _answers.get(key)
    if answer is None:
        return None
    if answer.rejection is not None:
        raise answer.rejection
    assert answer.hypothesis is not None
    assert answer.certificate is not None
    dims = list(_numbers(subgraph.live_ins, layouts, result))
    return _mapped(
        answer.hypothesis, lambda i: subgraph.live_ins[i], lambda i: dims[i], layouts, result
    ), answer.certificate


def is_lasting(rejection: Rejection) -> bool:
    """Whether the same part will be missed again: not where it did not run, for want of memory perhaps."""
    cause = rejection.__cause__
    return not isinstance(cause.__cause__ if isinstance(cause, CannotRun) else cause, (RuntimeError, MemoryError))


def remember(
    key: Any, subgraph: Subgraph, layouts: Layouts, result: Axes, found: tuple[Hypothesis, Certificate] | Rejection
) -> None:
    """Keeps an answer, without the part's own objects."""
    if isinstance(found, Rejection):
        _answers[key] = Answer(None, None, Rejection(found.given, found.near, found.open))
        return
    numbers = _numbers(subgraph.live_ins, layouts, result)
    places = {live_in: i for i, live_in in enumerate(subgraph.live_ins)}
    hypothesis = _mapped(found[0], places.__getitem__, numbers.__getitem__, {}, ())
    _answers[key] = Answer(hypothesis, found[1], None)


def _mapped(hypothesis: Hypothesis, live_in: Any, dim: Any, layouts: Layouts, result: Axes) -> Hypothesis:
    one = lambda s: None if s is None else live_in(s)  # noqa: E731
    axes = replace(
        hypothesis.axes, **{name: tuple(dim(a) for a in axis) for name, axis in vars(hypothesis.axes).items()}
    )
    return replace(
        hypothesis,
        layouts=layouts,
        result=result,
        axes=axes,
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


def _numbers(live_ins: list[LiveIn], layouts: Layouts, result: Axes) -> dict[Dim, int]:
    """The dims, each with a number: its place."""
    axes = [*(axis for s in live_ins for axis in layouts[s]), *result]
    return {dim: number for number, dim in enumerate(dict.fromkeys(dim for axis in axes for dim in axis))}


def _named(value: Value, names: dict[Value, Any]) -> Any:
    if value not in names:
        names[value] = ("number", *_digest(value.data)) if value.data is not None else ("unknown", id(value))
    return names[value]


def _digest(data: torch.Tensor) -> tuple[Any, ...]:
    numbers = data.detach().cpu().contiguous()
    raw = numbers.flatten().view(torch.uint8) if numbers.numel() else numbers
    return tuple(numbers.shape), str(numbers.dtype), hashlib.sha256(raw.numpy().tobytes()).hexdigest()
