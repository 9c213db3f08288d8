"""What a model must keep of the past, in bytes per sequence: states and, for comparison, keys and values."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from llcompile.look.mixer_look import MixerLook

LENGTHS = (4_096, 32_768, 131_072)
_NUMBER = 4  # bytes: states are float32


@dataclass(frozen=True)
class StateSize:
    """Bytes per sequence, of all converted mixers together.

    Args:
        tokens: T, how many were absorbed.
        linear: of the linear states, `H * K * V` numbers each, in float32.
        loglinear: of the log-linear ones as caches hold them, with the header and all L levels, whatever T is.
        occupied: of the levels that hold something, the mean over the positions up to T.
        most: the same at the position where it is largest.
        keys_and_values: of a softmax cache with the mixer's own keys and values, `T * (G * K + H * V)` numbers in the
            model's dtype.
    """

    tokens: int
    linear: int
    loglinear: int
    occupied: int
    most: int
    keys_and_values: int


def state_sizes(mixers: Iterable[MixerLook]) -> tuple[StateSize, ...]:
    """The sizes at `LENGTHS`; empty where no mixer was converted."""
    calls = [mixer.call for mixer in mixers if mixer.call is not None]
    found = []
    for tokens in LENGTHS if calls else ():
        linear = loglinear = most = keys_and_values = 0
        occupied = 0.0
        for call in calls:
            s = call.sizes
            state = _NUMBER * s.heads * s.key_dim * s.value_dim
            linear += state
            loglinear += state * (1 if call.levels is None else 1 + call.levels)
            occupied += state * (1 if call.levels is None else mean_occupied(tokens, call.levels))
            most += state * (1 if call.levels is None else min((tokens - 1).bit_length() + 1, call.levels))
            row = s.groups * s.key_dim + s.heads * s.value_dim
            keys_and_values += tokens * row * call.description.dtype.itemsize
        found.append(StateSize(tokens, linear, loglinear, round(occupied), most, keys_and_values))
    return tuple(found)


def mean_occupied(tokens: int, levels: int) -> float:
    """How many of L levels hold something, on average over the queries at `0 .. tokens - 1`, a power of two.

    Level 0 always does, a level l >= 1 at every other run of `2 ** (l - 1)` queries; the last one has all above it.
    """
    bits = tokens.bit_length() - 1
    if levels == 1 or not bits:
        return 1.0
    own = min(bits, levels - 2)
    return 1 + own / 2 + (1 - 0.5 ** (bits - own))


def as_table(sizes: tuple[StateSize, ...]) -> Table:
    """As the report prints them."""
    table = Table(title="kept per sequence, by all converted mixers", title_justify="left", box=None, pad_edge=False)
    for name in ("tokens", "linear", "log-linear cache", "occupied levels, mean (most)", "keys and values instead"):
        table.add_column(name, justify="right")
    for s in sizes:
        occupied = f"{_said(s.occupied)} ({_said(s.most)})"
        table.add_row(f"{s.tokens:,}", _said(s.linear), _said(s.loglinear), occupied, _said(s.keys_and_values))
    return table


def as_dicts(sizes: tuple[StateSize, ...]) -> list[dict[str, Any]]:
    """As JSON has them."""
    return [asdict(size) for size in sizes]


def _said(size: int) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size} B"
