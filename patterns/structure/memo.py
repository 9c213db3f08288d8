"""Memo: layers with the same code are read and proved once; a part that is the same program gets the same answer."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from llcompile.patterns.records import Certificate
from llcompile.patterns.structure.axes import Atom
from llcompile.patterns.structure.classify import Miss
from llcompile.patterns.structure.cut import Part
from llcompile.patterns.structure.frame import Row
from llcompile.patterns.structure.lifted import Source, sample_of
from llcompile.patterns.structure.nested import mapped
from llcompile.patterns.structure.program import Value
from llcompile.patterns.structure.ranges import Range
from llcompile.patterns.structure.reading import Reading

Rows = Mapping[Source, tuple[Row, ...]]


@dataclass(frozen=True)
class Answer:
    """What became of a part: a reading of its sources and atoms by number, or a miss."""

    reading: Reading | None
    certificate: Certificate | None
    miss: Miss | None


_answers: dict[Any, Answer] = {}


def fingerprint(part: Part, rows: Rows, result: tuple[Row, ...], ranges: Mapping[Source, Range]) -> Any:
    """Equal for two parts that are the same program: operations, numbers, shapes, axes and ranges of the sources."""
    names: dict[Value, Any] = {}
    for i, source in enumerate(part.sources):
        if isinstance(source, Value):
            names[source] = ("source", i)
        else:
            names.update((value, ("source", i, position)) for value, position in part.taps[source].items())
    steps = []
    for number, op in enumerate(part.ops):
        args = mapped(lambda a: _named(a, names) if isinstance(a, Value) else a, (op.args, op.kwargs))
        steps.append((str(op.target), repr(args)))
        for i, value in enumerate(op.outputs):
            names.setdefault(value, ("step", number, i))
    atoms = _numbers(part.sources, rows, result)
    shapes = tuple(
        (
            str(sample_of(s).dtype),
            tuple(tuple((atoms[id(a)], a.size, a.weight) for a in row) for row in rows[s]),
            ranges[s],
            s in part.learned,
        )
        for s in part.sources
    )
    final = tuple(tuple(atoms[id(a)] for a in row) for row in result)
    text = repr((steps, shapes, final, names[part.result], str(part.result.dtype)))
    return hashlib.sha256(text.encode()).hexdigest()


def recall(key: Any, part: Part, rows: Rows, result: tuple[Row, ...]) -> tuple[Reading, Certificate] | None:
    """The answer for this part, in its own sources and atoms; None where there is none yet.

    Raises:
        Miss: the answer was one.
    """
    answer = _answers.get(key)
    if answer is None:
        return None
    if answer.miss is not None:
        raise answer.miss
    assert answer.reading is not None
    assert answer.certificate is not None
    atoms = {number: atom for atom, number in _atoms(part.sources, rows, result)}
    return _mapped(answer.reading, lambda i: part.sources[i], lambda i: atoms[i], rows, result), answer.certificate


def is_lasting(miss: Miss) -> bool:
    """Whether the same part will be missed again: not where it did not run, for want of memory perhaps."""
    return not isinstance(miss.__cause__, (RuntimeError, MemoryError))


def remember(
    key: Any, part: Part, rows: Rows, result: tuple[Row, ...], found: tuple[Reading, Certificate] | Miss
) -> None:
    """Keeps an answer, without the part's own objects."""
    if isinstance(found, Miss):
        _answers[key] = Answer(None, None, Miss(found.given, found.near, found.open))
        return
    numbers = _numbers(part.sources, rows, result)
    places = {id(source): i for i, source in enumerate(part.sources)}
    reading = _mapped(found[0], lambda s: places[id(s)], lambda a: numbers[id(a)], {}, ())
    _answers[key] = Answer(reading, found[1], None)


def _mapped(reading: Reading, source: Any, atom: Any, rows: Rows, result: tuple[Row, ...]) -> Reading:
    one = lambda s: None if s is None else source(s)  # noqa: E731
    axes = replace(reading.axes, **{name: tuple(atom(a) for a in row) for name, row in vars(reading.axes).items()})
    return replace(
        reading,
        rows=rows,
        result=result,
        axes=axes,
        query=source(reading.query),
        key=source(reading.key),
        value=one(reading.value),
        factors=tuple((source(s), how) for s, how in reading.factors),
        decay=one(reading.decay),
        beta=one(reading.beta),
        post=tuple((source(s), how) for s, how in reading.post),
        first=one(reading.first),
        skip=None if reading.skip is None else tuple(map(source, reading.skip)),
    )


def _atoms(sources: list[Source], rows: Rows, result: tuple[Row, ...]) -> list[tuple[Atom, int]]:
    found: dict[int, Atom] = {}
    for axes in (*(rows[s] for s in sources), result):
        for row in axes:
            for atom in row:
                found.setdefault(id(atom), atom)
    return [(atom, number) for number, atom in enumerate(found.values())]


def _numbers(sources: list[Source], rows: Rows, result: tuple[Row, ...]) -> dict[int, int]:
    return {id(atom): number for atom, number in _atoms(sources, rows, result)}


def _named(value: Value, names: dict[Value, Any]) -> Any:
    if value not in names:
        names[value] = ("number", *_digest(value.data)) if value.data is not None else ("unknown", id(value))
    return names[value]


def _digest(data: torch.Tensor) -> tuple[Any, ...]:
    numbers = data.detach().cpu().contiguous()
    raw = numbers.flatten().view(torch.uint8) if numbers.numel() else numbers
    return tuple(numbers.shape), str(numbers.dtype), hashlib.sha256(raw.numpy().tobytes()).hexdigest()
