"""The plots of docs/evidence.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.evidence import models, recall
from benchmarks.evidence.language import TRAINED
from benchmarks.evidence.tables import Found
from benchmarks.evidence.training import ARMS, STAYING
from benchmarks.evidence.typeseg import AS_IT_IS, ORDER


def recall_plot(found: Found, out: Path) -> bool:
    """A point for each seed: the gain of each arm against staying, in points; returns whether there is anything."""
    tasks = [f"{layout}, {'told' if told else 'untold'}" for layout, told in recall.TASKS]
    panels = [(task, series) for task in tasks for series in recall.SERIES]
    shown = [(panel, points) for panel in panels if (points := _points(found, *panel))]
    if not shown:
        return False
    figure, axes = _subplots(len(shown))
    for axis, ((task, series), points) in zip(axes, shown, strict=True):
        axis.axhline(0, color="0.6", linewidth=0.8)
        axis.plot([x for x, _ in points], [y for _, y in points], "o", alpha=0.7)
        axis.set_xticks(range(len(ARMS) - 1), [arm.name for arm in ARMS[1:]], rotation=30)
        axis.set_title(f"{task}, {series}", fontsize=9)
        axis.set_ylabel("points over staying")
    _save(figure, out)
    return True


def _points(found: Found, task: str, series: str) -> list[tuple[int, float]]:
    points = []
    for file in found:
        results, base = file["results"], f"{task}: {STAYING.name}"
        if recall.series_of(file["plan"]) != series or base not in results:
            continue
        for number, arm in enumerate(ARMS[1:]):
            if (key := f"{task}: {arm.name}") in results:
                points.append((number, 100 * (results[key]["accuracy"] - results[base]["accuracy"])))
    return points


def typeseg_plot(found: Found, out: Path) -> bool:
    """Accuracy by position, the mean of all seeds; returns whether there is anything."""
    lines = {
        name: [f["results"][name]["by_position"] for f in found if name in f["results"]] for name in (AS_IT_IS, *ORDER)
    }
    lines = {name: values for name, values in lines.items() if values}
    if not lines:
        return False
    figure, (axis,) = _subplots(1)
    for name, values in lines.items():
        axis.plot([sum(column) / len(column) for column in zip(*values, strict=True)], "o-", label=name)
    axis.set_xlabel("part of the document")
    axis.set_ylabel("accuracy")
    axis.legend(fontsize=8)
    _save(figure, out)
    return True


def language_plot(found: Found, out: Path) -> bool:
    """How far the loss of each way is from the trained model's, by position; returns whether there is anything."""
    files = [file for file in found if len(file["results"]) > 1 and TRAINED in file["results"]]
    if not files:
        return False
    figure, axes = _subplots(len(files))
    for axis, file in zip(axes, files, strict=True):
        base = file["results"][TRAINED]
        for name, result in file["results"].items():
            if name != TRAINED:
                difference = [after - before for before, after in zip(base["loss"], result["loss"], strict=True)]
                axis.plot(base["ends"], difference, "o-", label=name, markersize=3)
        axis.axvline(file["plan"]["length"], color="0.6", linestyle=":")
        axis.axhline(0, color="0.6", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_xlabel("position (dotted: training length)")
        axis.set_ylabel("loss minus the trained model's, nats per byte")
        axis.set_title(models.FAMILIES[file["plan"]["family"]], fontsize=9)
        axis.legend(fontsize=7)
    _save(figure, out)
    return True


def _subplots(count: int) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(2, count)
    rows = -(-count // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(5 * columns, 3.4 * rows), squeeze=False)
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return figure, list(axes.flat[:count])


def _save(figure: Any, out: Path) -> None:
    from matplotlib import pyplot

    out.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    pyplot.close(figure)
