"""The picture of ``llcompile bench operator --device cuda``: time against T, both axes logarithmic, a panel a pass."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.cuda.cases import OURS, PHASES, Case, Phase

Answer = dict[str, Any]
# Ours in full lines, softmax dotted, other peers dashed: who is who without colours.
_STYLES = {"log-linear": "-", "linear": "-", "softmax": ":"}


def holds(result: Answer) -> bool:
    """Whether this is a timed case."""
    return "case" in result and "milliseconds" in result


def draw(record: Answer, out: Path) -> None:
    """Write the picture of the size that has most measurements."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    timed = [(Case(**r["case"]), r) for r in record["results"] if holds(r)]
    size = Counter(case.size for case, _ in timed).most_common(1)[0][0]
    timed = [(case, r) for case, r in timed if case.size == size]
    phases = [phase for phase in PHASES if any(case.phase == phase for case, _ in timed)]
    figure, axes = pyplot.subplots(1, len(phases), figsize=(6 * len(phases), 5), squeeze=False)
    for axis, phase in zip(axes[0], phases, strict=True):
        _panel(axis, phase, lines(timed, phase))
    name, (batch, heads, key_dim, value_dim) = record.get("chip", {}).get("name", "unknown device"), size
    figure.suptitle(f"{name}, {record['date'][:10]}, B={batch} H={heads} K={key_dim} V={value_dim} bf16")
    figure.tight_layout()
    figure.savefig(out, dpi=150)
    pyplot.close(figure)


def lines(timed: list[tuple[Case, Answer]], phase: Phase) -> dict[tuple[str, str], list[tuple[int, float]]]:
    """``(name, line style)`` -> points ``(T, ms)`` by length."""
    found: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for case, r in sorted(timed, key=lambda pair: pair[0].length):
        if case.phase != phase:
            continue
        peer = case.runs != OURS and case.operator != "softmax"
        name = case.runs if case.runs != OURS else f"ours, {case.operator} {case.decay}/{case.correction}"
        style = "--" if peer else _STYLES[case.operator]
        found.setdefault((name, style), []).append((case.length, r["milliseconds"]))
    return found


def _panel(axis: Any, phase: Phase, series: dict[tuple[str, str], list[tuple[int, float]]]) -> None:
    for (name, style), points in series.items():
        axis.plot(*zip(*points, strict=True), style, marker="o", markersize=3, label=name)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set(title=PHASES[phase], xlabel="T, tokens", ylabel="ms")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
