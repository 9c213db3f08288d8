"""Learned weights over positions: the token MLP of MLP-Mixer and gMLP, the low-rank projections of Linformer."""

from __future__ import annotations

from collections.abc import Iterator

from llcompile.patterns.mechanisms.axes import TimeAxes
from llcompile.patterns.mechanisms.facts import Facts
from llcompile.patterns.mechanisms.found import Found


def find(facts: Facts, axes: TimeAxes) -> Iterator[Found]:
    """Every sum over positions with learned weights."""
    for node in axes.mixed:
        yield Found(node, "time mixing by a weight (MLP-Mixer)", inside=frozenset((node,)))
