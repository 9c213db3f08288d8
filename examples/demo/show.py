"""What the demo prints and plots, all of it computed from the outcomes of this very run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.table import Table

from demo.experiment import Outcome
from demo.recall import Accuracy, Task
from demo.training import ARMS, Plan

CONTROL = "staying linear"
# Wong's palette, told apart by most kinds of colour blindness: control, level weights alone, all weights.
COLOURS = dict(zip((arm.name for arm in ARMS), ("#666666", "#E69F00", "#0072B2"), strict=True))
Stage = tuple[str, Callable[[Outcome], Accuracy]]


def stages(plan: Plan) -> list[Stage]:
    """What is compared: a label, and which accuracy it stands for."""
    said: list[Stage] = [
        (f"linear model, {plan.steps} steps", lambda outcome: outcome.before),
        ("converted, level weights 1", lambda outcome: outcome.converted),
    ]
    return said + [
        (f"+{plan.more} steps: {arm.name}", lambda outcome, name=arm.name: outcome.after[name])  # type: ignore[misc]
        for arm in ARMS
    ]


def accuracies(outcomes: Sequence[Outcome], plan: Plan) -> Table:
    """Accuracy side by side: a row for each seed, the mean and the spread."""
    title = f"accuracy on held-out sequences ({outcomes[0].before.queries:,} queries)"
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    columns = [[accuracy(outcome).overall for outcome in outcomes] for _, accuracy in stages(plan)]
    for label, _ in stages(plan):
        table.add_column(label, justify="right", min_width=8)
    for number, outcome in enumerate(outcomes):
        table.add_row(f"seed {outcome.seed}", *(f"{column[number]:.3f}" for column in columns))
    if len(outcomes) > 1:
        table.add_section()
        table.add_row("mean", *(f"{mean(column):.3f}" for column in columns))
        table.add_row("deviation", *(f"{stdev(column):.3f}" for column in columns))
    return table


def by_distance(outcomes: Sequence[Outcome], plan: Plan, task: Task) -> Table:
    """Accuracy for each octave of distance (mean over seeds)."""
    table = Table(title="accuracy by distance, in slots between a pair and its query", title_justify="left")
    table.add_column("", no_wrap=True)
    for label in octave_labels(task):
        table.add_column(label, justify="right")
    for label, accuracy in stages(plan):
        table.add_row(label, *(f"{share:.3f}" for share in _octaves(outcomes, accuracy)))
    return table


def octave_labels(task: Task) -> list[str]:
    """The distances of each octave: "1", "2-3", "4-7", …"""
    return [f"{2**n}-{2 ** (n + 1) - 1}" if n else "1" for n in range(task.octaves)]


def verdict(outcomes: Sequence[Outcome]) -> list[str]:
    """A line for each way of going on with level weights, whether it won or lost."""
    lines = []
    for arm in ARMS:
        if arm.name == CONTROL:
            continue
        gains = [100 * (o.after[arm.name].overall - o.after[CONTROL].overall) for o in outcomes]
        better = sum(gain > 0 for gain in gains)
        how = "above" if mean(gains) > 0 else "below"
        spread = f" (from {min(gains):+.1f} to {max(gains):+.1f}, above in {better} of {len(gains)} seeds)"
        lines.append(f"{arm.name}: {abs(mean(gains)):.1f} points {how} {CONTROL}{spread if len(gains) > 1 else ''}")
    return lines


def effect(outcomes: Sequence[Outcome]) -> list[str]:
    """A line for each way of going on with level weights: what the trained level weights do in the model."""
    lines = []
    for arm in outcomes[0].without:
        trained, without = mean(o.after[arm].overall for o in outcomes), mean(o.without[arm].overall for o in outcomes)
        lines.append(f"{arm}: {trained:.3f} as trained, {without:.3f} with its level weights reset to 1")
    return lines


def save(outcomes: Sequence[Outcome], task: Task, plan: Plan, folder: Path) -> Path:
    """Writes every number to recall.json; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recall.json"
    everything = {"task": asdict(task), "plan": asdict(plan), "outcomes": [asdict(outcome) for outcome in outcomes]}
    path.write_text(json.dumps(everything, indent=2) + "\n")
    return path


def plot(outcomes: Sequence[Outcome], task: Task, plan: Plan, folder: Path) -> Path | None:
    """Writes recall.png; returns its path, or None where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure  # not pyplot: no window, no global state
    except ImportError:
        return None
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _plot_curves(left, outcomes, plan)
    _plot_octaves(right, outcomes, task)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recall.png"
    figure.savefig(path, dpi=130)
    return path


def _plot_curves(axes: Any, outcomes: Sequence[Outcome], plan: Plan) -> None:
    for number, outcome in enumerate(outcomes):
        _curve(axes, outcome.learned, 0, "black", "linear model" if number == 0 else None)
        for name, curve in outcome.curves.items():
            _curve(axes, curve, plan.steps, COLOURS[name], name if number == 0 else None)
    axes.axvline(plan.steps, color="black", linestyle=":", linewidth=1)
    axes.annotate("conversion ", (plan.steps, 0.02), ha="right", fontsize=9)
    axes.set(xlabel="training steps", ylabel="accuracy, held out", ylim=(0, 1), title="Associative recall, Mamba-2")
    axes.legend(loc="upper left", frameon=False)
    axes.grid(alpha=0.3)


def _curve(axes: Any, curve: Sequence[tuple[int, float]], offset: int, colour: str, label: str | None) -> None:
    steps, shares = zip(*curve, strict=True)
    axes.plot([offset + step for step in steps], shares, color=colour, label=label, marker=".", linewidth=1.5)


def _plot_octaves(axes: Any, outcomes: Sequence[Outcome], task: Task) -> None:
    labels = octave_labels(task)
    axes.plot(labels, _octaves(outcomes, lambda o: o.before), color="black", marker=".", linestyle=":")
    for arm in ARMS:
        shares = _octaves(outcomes, lambda o, name=arm.name: o.after[name])  # type: ignore[misc]
        axes.plot(labels, shares, color=COLOURS[arm.name], marker=".")
    axes.set(xlabel="distance from pair to query, in slots", ylim=(0, 1), title="By distance (dotted: before)")
    axes.grid(alpha=0.3)


def _octaves(outcomes: Sequence[Outcome], accuracy: Callable[[Outcome], Accuracy]) -> list[float]:
    return [mean(shares) for shares in zip(*(accuracy(outcome).by_octave for outcome in outcomes), strict=True)]
