"""Page: a trial as one HTML file that needs no network, in the style of the page of `llcompile.inspect`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from llcompile import __version__
from llcompile.look.environment import environment
from llcompile.trials.outcome import Gain, Outcome

_WIDTH, _HEIGHT, _MARGIN = 560, 180, 28  # of a drawing, in pixels


def page(trial: Outcome) -> str:
    """The page's text."""
    template = _environment().get_template("trial.html.j2")
    gains = (("position", "positions in the sequence", trial.by_position), ("distance", "distances", trial.by_distance))
    return template.render(
        trial=trial,
        drawings=[(axis, title, found, bars(found)) for axis, title, found in gains if found],
        size=(_WIDTH, _HEIGHT),
        versions=f"llcompile {__version__}, torch {torch.__version__}",
    )


def bars(gains: Sequence[Gain]) -> dict[str, Any]:
    """Where the bars of a drawing lie: the height of zero, and of each bar its box and the ends of its interval."""
    top = max(0.0, *(g.gain.high for g in gains))
    bottom = min(0.0, *(g.gain.low for g in gains))
    unit = (_HEIGHT - 2 * _MARGIN) / ((top - bottom) or 1.0)
    step = (_WIDTH - 2 * _MARGIN) / len(gains)

    def at(value: float) -> float:
        return _MARGIN + (top - value) * unit

    boxes = [
        {
            "x": _MARGIN + (i + 0.15) * step, "width": 0.7 * step, "middle": _MARGIN + (i + 0.5) * step,
            "y": at(max(g.gain.mean, 0.0)), "height": abs(g.gain.mean) * unit,
            "high": at(g.gain.high), "low": at(g.gain.low), "label": f"{g.low}-{g.high}", "gain": g,
        }
        for i, g in enumerate(gains)
    ]  # fmt: skip
    return {"zero": at(0.0), "boxes": boxes}


def number(value: float | None) -> str:
    """A number of a table, "-" where it is unknown."""
    return "-" if value is None else f"{value:.4f}"


@cache
def _environment() -> Any:
    return environment({"number": number})
