"""The cost of one pass: its launches at their full sizes, what torch does around them, and the memory."""

from __future__ import annotations

import dataclasses
import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from llcompile.errors import SpecError
from llcompile.kernels.triton.cost.around import Around, Planned, around
from llcompile.kernels.triton.cost.case import Case
from llcompile.kernels.triton.cost.counter import Counted
from llcompile.kernels.triton.cost.families import STEPS
from llcompile.kernels.triton.cost.scale import (
    BLOCK_FEATURES,
    BLOCK_SAMPLES,
    FEATURES,
    SAMPLES,
    Formula,
    Shape,
    formula,
)
from llcompile.kernels.triton.cost.worker import counts

Numbers = dict[str, int]
# Programs of kernels that go over lanes have tiles of this many heads at most, so a sample needs no more.
_LANES = 16
# Positions at which steps are counted: what a step does depends on the bits of its position.
_POSITIONS = 6


@dataclass(frozen=True)
class Row:
    """All launches of one kernel in a pass."""

    kernel: str
    launches: int
    programs: int
    numbers: Numbers


@dataclass(frozen=True)
class Cost:
    """One pass. Of a step, numbers are the mean over `_POSITIONS` positions, rounded; `most` is the largest total."""

    case: Case
    rows: tuple[Row, ...]
    around: Around
    most: Numbers

    @property
    def total(self) -> Numbers:
        """Numbers of all kernels."""
        return dict(sum((Counter(row.numbers) for row in self.rows), Counter()))

    @property
    def moved(self) -> int:
        """Distinct bytes that kernels read and write, and what torch's operators around them move."""
        return self.total["read"] + self.total["written"] + self.around.moved

    @property
    def chunks(self) -> int:
        """Chunks of all heads: what numbers per chunk are divided by. Of a step, heads."""
        case = self.case
        each = 1 if case.operation in STEPS else -(-case.length // 64)
        return case.batch * case.heads * each

    def record(self) -> dict[str, Any]:
        """For JSON."""
        rows = [dataclasses.asdict(row) for row in self.rows]
        found = {"case": dataclasses.asdict(self.case), "kernels": rows, "total": self.total, "most": self.most}
        torch = {"calls": self.around.calls, "moved": self.around.moved}
        memory = {"peak": self.around.peak, "results": self.around.results, "workspace": self.around.workspace}
        return found | {"launches": len(self.around.launches), "torch": torch, "memory": memory, "moved": self.moved}


def cost(case: Case) -> Cost:
    """Count `case`.

    Raises:
        SpecError: a length that is not whole chunks, heads that are not whole groups.
        KernelError: counts follow no formula, or the interpreter failed.
    """
    return costs([case])[0]


def costs(cases: Iterable[Case]) -> list[Cost]:
    """As `cost`, in one process for all."""
    cases = list(cases)
    for case in cases:
        _check(case)
    samples = [_samples(case) for case in cases]
    found = iter(counts([one for group in samples for one in group]))
    counted = [[(one, next(found)) for one in group] for group in samples]
    return [
        (_step if case.operation in STEPS else _pass)(case, group) for case, group in zip(cases, counted, strict=True)
    ]


def _check(case: Case) -> None:
    if case.length % case.unit or case.length < case.unit:
        what = "blocks" if case.goes_in_blocks else "chunks"
        raise SpecError(f"length {case.length}: counted are whole {what} of {case.unit} tokens; use a multiple of it")
    segment = case.in_segments_of
    if segment is not None and case.segment is None and case.length % segment:
        raise SpecError(f"length {case.length}: counted are whole segments of {segment} tokens; use a multiple of it")
    if case.heads % case.groups:
        raise SpecError(f"{case.heads} heads in {case.groups} groups: heads must be a multiple of groups")


def _samples(case: Case) -> list[Case]:
    """The small cases that stand for `case`: few heads, and few chunks or several positions."""
    heads = math.gcd(case.heads // case.groups, _LANES) if case.decay == "rate" else min(case.heads // case.groups, 2)
    form = {"in_blocks": case.goes_in_blocks, "segment": case.in_segments_of}
    one = dataclasses.replace(case, batch=1, heads=heads, groups=1, **form)  # type: ignore[arg-type]
    if case.operation in STEPS:
        drawn = random.Random(0).sample(range(case.length // 2, case.length), min(_POSITIONS, case.length // 2))
        return [dataclasses.replace(one, length=position) for position in (*drawn, case.length - 1)]
    whole = _chunks(case)
    samples = BLOCK_SAMPLES if case.goes_in_blocks else SAMPLES
    chunks = (whole,) if whole <= max(samples) else samples
    return [dataclasses.replace(one, length=n * case.unit) for n in chunks]


def _chunks(case: Case) -> int:
    """Chunks (blocks) of a sequence, or of each of its segments."""
    return min(case.in_segments_of or case.length, case.length) // case.unit


Group = list[tuple[Case, list[Counted]]]


def _factor(case: Case, sample: Case) -> int:
    """How many times the sample's heads there are."""
    return case.batch * case.heads // sample.heads


def _pass(case: Case, group: Group) -> Cost:
    seen = around(case.runner("meta"))
    factor, chunks = _factor(case, group[0][0]), _chunks(case)
    formulas = _formulas(group)
    rows: dict[str, list[tuple[Planned, Numbers]]] = defaultdict(list)
    for launch in seen.launches:
        shape = Shape(_programs(case, launch.programs, launch.tiles) // factor, chunks)
        rows[launch.kernel].append((launch, {n: f.at(shape) * factor for n, f in formulas[launch.kernel].items()}))
    found = tuple(_row(kernel, launches) for kernel, launches in rows.items())
    total = dict(sum((Counter(row.numbers) for row in found), Counter()))
    return Cost(case, found, seen, total)


def _programs(case: Case, programs: int, tiles: int) -> int:
    """Programs that do the same work: all tiles of one, or each tile of lanes, which are heads."""
    return programs * tiles if case.decay == "rate" else programs


def _formulas(group: Group) -> dict[str, dict[str, Formula]]:
    """For each kernel and each of its numbers."""
    features = BLOCK_FEATURES if group[0][0].goes_in_blocks else FEATURES
    samples: dict[str, list[tuple[Shape, Counter[str]]]] = defaultdict(list)
    for case, launches in group:
        for launch in launches:
            shape = Shape(_programs(case, *launch.grid[:2]), case.length // case.unit)
            samples[launch.kernel].append((shape, launch.numbers))
    return {
        kernel: {
            name: formula(f"{kernel}, {name}", [(shape, numbers[name]) for shape, numbers in found], features)
            for name in dict.fromkeys(n for _, numbers in found for n in numbers)
        }
        for kernel, found in samples.items()
    }


def _row(kernel: str, launches: list[tuple[Planned, Numbers]]) -> Row:
    numbers = dict(sum((Counter(n) for _, n in launches), Counter()))
    return Row(kernel, len(launches), sum(launch.programs * launch.tiles for launch, _ in launches), numbers)


def _step(case: Case, group: Group) -> Cost:
    """The mean over the positions that were drawn; the last one has all bits set."""
    factor = _factor(case, group[0][0])
    seen = around(case.runner("meta"))
    drawn = group[:-1]
    rows = []
    for kernel in dict.fromkeys(launch.kernel for launch in seen.launches):
        mine = [launch.numbers for _, launches in drawn for launch in launches if launch.kernel == kernel]
        mean = {name: round(n * factor / len(drawn)) for name, n in sum(mine, Counter()).items()}
        planned = [launch for launch in seen.launches if launch.kernel == kernel]
        rows.append(Row(kernel, len(planned), sum(one.programs * one.tiles for one in planned), mean))
    totals: list[Counter[str]] = [sum((one.numbers for one in launches), Counter()) for _, launches in group]
    most = {name: max(total[name] for total in totals) * factor for name in totals[0]}
    return Cost(case, tuple(rows), seen, most)
