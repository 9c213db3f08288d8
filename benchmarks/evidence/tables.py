"""The tables of docs/evidence.md, from the files of the experiments."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.evidence import models, recall
from benchmarks.evidence.language import TRAINED, WAYS
from benchmarks.evidence.needles import TASKS
from benchmarks.evidence.training import ARMS, STAYING
from benchmarks.evidence.typeseg import AS_IT_IS, ORDER
from llcompile.trials.student import interval

Found = list[dict[str, Any]]
WANTED = 5.0  # points that routed level weights are to gain where distances are untold


def gain(pairs: Sequence[tuple[float, float]]) -> str:
    """The mean of differences with its paired 95 % interval, in points, and in how many pairs it is above 0."""
    differences = [100 * (after - before) for before, after in pairs]
    above = f"({sum(difference > 0 for difference in differences)} of {len(differences)})"
    if len(differences) < 2:
        return f"{differences[0]:+.1f} {above}"
    found = interval(differences)
    return f"{found.mean:+.1f} ± {found.high - found.mean:.1f} {above}"


def recall_tables(found: Found) -> str:
    """Accuracies before and after, gains against staying, and the verdict on the goal."""
    rows, verdicts = [], []
    for layout, told in recall.TASKS:
        for series, name in ((key, one.title) for key, one in recall.SERIES.items()):
            task = f"{layout}, {'told' if told else 'untold'}"
            files = [
                f["results"]
                for f in found
                if recall.series_of(f["plan"]) == series and f"{task}: {STAYING.name}" in f["results"]
            ]
            if not files:
                continue
            gains = [_gains(files, task, arm.name) for arm in ARMS[1:]]
            means = [_mean(file[f"{task}: {part}"]["accuracy"] for file in files) for part in ("trained", STAYING.name)]
            rows.append([task, name, *(f"{mean:.3f}" for mean in means), *(gain(g) if g else "-" for g in gains)])
            if not told:
                verdicts.append(_verdict(task, name, gains[-1]))
    head = ["task", "model", "trained", STAYING.name, *(arm.name for arm in ARMS[1:])]
    return "\n".join([table(head, rows), "", *verdicts])


def _gains(files: Sequence[dict[str, Any]], task: str, arm: str) -> list[tuple[float, float]]:
    return [
        (file[f"{task}: {STAYING.name}"]["accuracy"], file[f"{task}: {arm}"]["accuracy"])
        for file in files
        if f"{task}: {arm}" in file
    ]


def _verdict(task: str, name: str, pairs: Sequence[tuple[float, float]]) -> str:
    met = sum(100 * (after - before) >= WANTED for before, after in pairs)
    return f"* {task}, {name}: `routed` gains {WANTED:g} points over staying linear with {met} of {len(pairs)} seeds."


def by_distance(found: Found) -> str:
    """For zoology's layout and ours, untold: the accuracy by octave of distance."""
    rows = []
    for layout, told in recall.TASKS:
        task = f"{layout}, {'told' if told else 'untold'}"
        for series in recall.SERIES if not told else ():
            for arm in ("trained", STAYING.name, ARMS[-1].name):
                key = f"{task}: {arm}"
                files = [
                    f["results"][key] for f in found if recall.series_of(f["plan"]) == series and key in f["results"]
                ]
                if files:
                    columns = zip(*(file["by_octave"] for file in files), strict=True)
                    rows.append([task, series, arm, *(_or_none(column) for column in columns)])
    octaves = max((len(row) - 3 for row in rows), default=0)
    return table(["task", "model", "arm", *(_range(octave) for octave in range(octaves))], rows)


def _range(octave: int) -> str:
    return "1" if octave == 0 else f"{2**octave}-{2 ** (octave + 1) - 1}"


def _or_none(column: Sequence[float | None]) -> str:
    numbers = [number for number in column if number is not None]
    return f"{_mean(numbers):.3f}" if numbers else "-"


def typeseg_tables(found: Found) -> str:
    """Accuracy as it is and after each way, by position, and gains against staying."""
    files = [f["results"] for f in found if AS_IT_IS in f["results"]]
    if not files:
        return _NOTHING
    rows = []
    for name in (AS_IT_IS, *ORDER):
        there = [file for file in files if name in file]
        if not there:
            continue
        parts = zip(*(file[name]["by_position"] for file in there), strict=True)
        against = [(file["staying"]["accuracy"], file[name]["accuracy"]) for file in there if "staying" in file]
        shown = gain(against) if against and name not in ("staying", AS_IT_IS) else "-"
        rows.append(
            [name, f"{_mean(f[name]['accuracy'] for f in there):.4f}", shown, *(f"{_mean(p):.4f}" for p in parts)]
        )
    bins = len(rows[0]) - 3
    head = ["way", "accuracy", "against staying, points", *(f"part {number + 1} of {bins}" for number in range(bins))]
    types = ", ".join(files[0][AS_IT_IS]["types"])
    return f"{table(head, rows)}\n\nTypes that this machine has files of: {types}."


def language_tables(found: Found) -> str:
    """For each family: what was trained, the loss by position, and the needles."""
    parts = [_family(file) for file in found if TRAINED in file["results"]]
    return "\n\n".join(parts) or _NOTHING


def _family(file: dict[str, Any]) -> str:
    results, plan = file["results"], file["plan"]
    trained = results[TRAINED]
    names = [name for name in (TRAINED, *(way.arm.name for way in WAYS)) if name in results]
    losses = [[name, *(f"{loss:.4f}" for loss in results[name]["loss"])] for name in names]
    positions = [f"to {end}" for end in trained["ends"]]
    needles = [
        [name, task, *(_answered(results[name]["needles"][task][str(n)]) for n in plan["questions"])]
        for task in TASKS
        for name in names
    ]
    text = (
        f"{models.FAMILIES[plan['family']]}: {trained['parameters']:,} parameters, {trained['steps']:,} steps of "
        f"{plan['tokens']:,} bytes at length {plan['length']}, then {plan['more']} steps in each way; a checkpoint of "
        f"{trained['bytes'] / 1e6:.1f} MB. Loss in nats per byte, by position:"
    )
    lengths = [f"{n} bytes" for n in plan["questions"]]
    shown = [text, table(["way", *positions], losses), "Needles: answers that are right, per cent, and their bytes:"]
    return "\n\n".join([*shown, table(["way", "task", *lengths], needles)])


def _answered(found: dict[str, float]) -> str:
    return f"{100 * found['answers']:.0f} ({100 * found['bytes']:.0f})"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; a line of text where there is no row."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *lines]) if lines else _NOTHING


_NOTHING = "No results yet."


def _mean(numbers: Iterable[float]) -> float:
    return statistics.mean(numbers)
