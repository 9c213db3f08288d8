"""The families and passes that are counted."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

from llcompile.kernels.description import Correction, Decay

Pass = Literal["forward", "backward", "step", "step in place", "replay", "fold"]
PASSES: tuple[Pass, ...] = get_args(Pass)
# One token after those before it. A `ReplayState` has two: "replay" reads a token, and once a chunk "fold" makes the
# next state of that chunk's tokens.
STEPS: tuple[Pass, ...] = ("step", "step in place", "replay", "fold")


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
