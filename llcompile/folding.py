"""Folding: equal rows stand once, and names that differ in a number are one name: `layers.0-63.mixer`."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from typing import TypeVar

Row = TypeVar("Row")


def grouped(rows: Iterable[Row], key: Callable[[Row], Hashable]) -> list[tuple[Row, ...]]:
    """Rows with the same key, in the order in which the keys come first."""
    found: dict[Hashable, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return [tuple(group) for group in found.values()]


def folded(names: Iterable[str]) -> list[str]:
    """Names of modules with runs of numbers in place of single ones, "(root)" for ""; each name counts once.

    `a.0.b`, `a.1.b`, `a.3.b` and `c` become `a.0-1,3.b` and `c`.
    """
    split = list(dict.fromkeys(tuple(name.split(".")) for name in names))
    for position in range(max(map(len, split), default=0)):
        split = [_joined(group, position) for group in grouped(split, partial(_without, position))]
    return [".".join(parts) or "(root)" for parts in split]


def _without(position: int, parts: tuple[str, ...]) -> Hashable:
    """Equal for names that may differ at the position: both have a plain number there."""
    if len(parts) <= position or not parts[position].isdecimal():
        return parts
    return parts[:position], parts[position + 1 :]


def _joined(group: Sequence[tuple[str, ...]], position: int) -> tuple[str, ...]:
    first = group[0]
    if len(group) == 1:
        return first
    return (*first[:position], runs([int(parts[position]) for parts in group]), *first[position + 1 :])


def runs(numbers: Iterable[int]) -> str:
    """Different numbers as text, neighbours as one: `0-2,4`."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][-1] + 1:
            found[-1].append(number)
        else:
            found.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in found)
