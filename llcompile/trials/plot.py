"""Plot: the arms side by side, and the gain by position."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llcompile.errors import MissingLibraryError, OutputError
from llcompile.look import files
from llcompile.trials.outcome import Outcome

# Wong's palette, told apart by most kinds of colour blindness: controls, converted arms.
_CONTROL, _CONVERTED = "#666666", "#0072B2"


def available() -> bool:
    """Whether matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def plot(trial: Outcome, path: str | Path) -> Path:
    """Draw a trial into a file whose suffix names the format.

    Raises:
        MissingLibraryError: matplotlib is not installed.
        OutputError: the file cannot be written, or its suffix is unknown.
    """
    target = Path(path)
    files.check_target(target)
    try:
        from matplotlib.figure import Figure  # not pyplot: no window, no global state
    except ImportError:
        raise MissingLibraryError("a plot needs matplotlib: pip install 'llcompile[plot]'") from None
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    _arms(left, trial)
    _positions(right, trial)
    figure.suptitle(trial.verdict.decision)
    try:
        figure.savefig(target, dpi=130)
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot write {target}: {error}") from error
    return target


def _arms(axes: Any, trial: Outcome) -> None:
    """A dot for each seed, a line for the mean; arms that diverged have their name alone."""
    metric, part = trial.plan.metric, trial.bins[trial.plan.part]
    for place, arm in enumerate(trial.arms):
        colour = _CONVERTED if arm.converted else _CONTROL
        halves = [r.judge for r in trial.records[arm.name].values()]
        values = [v for half in halves if half is not None and (v := half.position.value(metric, part)) is not None]
        axes.plot([place] * len(values), values, "o", color=colour, alpha=0.5)
        if values and len(values) == len(halves):
            axes.plot([place - 0.3, place + 0.3], [sum(values) / len(values)] * 2, color=colour)
    axes.set_xticks(range(len(trial.arms)), [arm.name.replace(" (", "\n(") for arm in trial.arms], fontsize=7)
    axes.set(ylabel=f"{metric}, held out", title="each seed, and the mean")
    axes.grid(alpha=0.3)


def _positions(axes: Any, trial: Outcome) -> None:
    gains = trial.by_position
    places = range(len(gains))
    low = [g.gain.mean - g.gain.low for g in gains]
    high = [g.gain.high - g.gain.mean for g in gains]
    axes.bar(places, [g.gain.mean for g in gains], color=_CONVERTED, yerr=[low, high] if gains else None, capsize=3)
    axes.set_xticks(places, [f"{g.low}-{g.high}" for g in gains], fontsize=7)
    axes.axhline(0, color="black", linewidth=1)
    title = f"{trial.verdict.arm} against {trial.verdict.control}" if gains else "no gain to show"
    axes.set(xlabel="position", ylabel=f"gain in {trial.plan.metric}", title=title)
    axes.grid(alpha=0.3, axis="y")
