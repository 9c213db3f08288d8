"""The families and passes that are counted."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

from llcompile.kernels.description import Correction, Decay

Pass = Literal["forward", "backward", "step", "step in place"]
PASSES: tuple[Pass, ...] = get_args(Pass)
STEPS: tuple[Pass, ...] = ("step", "step in place")


class Family(NamedTuple):
    """A cell of the table of families."""

    decay: Decay
    correction: Correction


FAMILIES: dict[str, Family] = {
    "none/none": Family("none", "none"),
    "scalar/none": Family("scalar", "none"),
    "channel/none": Family("channel", "none"),
    "none/delta": Family("none", "delta"),
    "scalar/delta": Family("scalar", "delta"),
    "channel/delta": Family("channel", "delta"),
    "channel/erase": Family("channel", "erase"),
    "rate/none": Family("rate", "none"),
}
