"""``llcompile bench plot FILE.json --out F.png``: time against T, both axes logarithmic, a panel a pass."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

from ...errors import BenchError
from .cases import OURS, PHASES, Case, Phase

Answer = dict[str, Any]
# Ours in full lines, softmax dotted, other peers dashed: who is who without colours.
_STYLES = {"log-linear": "-", "linear": "-", "softmax": ":"}


def add_parser(subparsers: Any) -> None:
    """Add ``plot`` to ``llcompile bench``."""
    parser = subparsers.add_parser("plot", help="time against T, from what 'operator --device cuda' wrote")
    parser.add_argument("file", type=Path, metavar="FILE.json", help="results of 'operator --device cuda'")
    parser.add_argument("--out", type=Path, required=True, help="picture to write: .png, .svg or .pdf")
    parser.set_defaults(measure=run)


def run(args: argparse.Namespace) -> int:
    """Draw; raises BenchError for a file that is no result, or without matplotlib."""
    record = results_of(args.file)
    draw(record, args.out)
    print(f"written to {args.out}")
    return 0


def results_of(path: Path) -> Answer:
    """The record in a file that a run wrote; raises BenchError if it is none, or if no case in it has a time."""
    try:
        record = json.loads(path.read_text())
    except OSError as error:
        raise BenchError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise BenchError(f"{path} is not JSON: {error}") from error
    results = record.get("results", ()) if isinstance(record, dict) else ()
    if not any("case" in r and "milliseconds" in r for r in results):
        raise BenchError(f"{path} holds no times of 'llcompile bench operator --device cuda'")
    return dict(record)


def draw(record: Answer, out: Path) -> None:
    """Write the picture of the size that has most measurements."""
    try:
        import matplotlib
    except ImportError as error:
        raise BenchError("plots need matplotlib: pip install 'llcompile[plot]', or pip install matplotlib") from error
    matplotlib.use("agg")
    from matplotlib import pyplot

    timed = [(Case(**r["case"]), r) for r in record["results"] if "milliseconds" in r]
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
