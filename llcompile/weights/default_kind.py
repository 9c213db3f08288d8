"""The kind of level weights where none was asked for: from the sizes of the mixer alone."""

from __future__ import annotations

import math
from typing import NamedTuple

from llcompile.weights.level_kinds import HIDDEN, KINDS, Sizes

AUTO = "auto"
# Parameters of one mixer up to which level weights are linear.
LARGEST = 1_000_000


class Choice(NamedTuple):
    """A kind, and what the report says of it where it is not the usual one."""

    kind: str
    remark: str = ""


def choose(heads: int, levels: int, width: int) -> Choice:
    """The kind for H sets of weights, L levels and an input of width D: `linear`, or `mlp` where that is large.

    Only these three sizes count, so that one mixer gets one kind in every model, process and wrapper.
    """
    linear = parameters("linear", Sizes(heads, levels, width))
    small = parameters("mlp", Sizes(heads, levels, width, HIDDEN))
    if linear <= LARGEST or small >= linear:
        return Choice("linear")
    return Choice(
        "mlp",
        f"level weights of kind mlp with {small:,} parameters per mixer, because linear ones would have {linear:,}, "
        f"more than {LARGEST:,}; options={{'level_weights': 'linear'}} makes them linear",
    )


def parameters(kind: str, sizes: Sizes) -> int:
    """How many parameters level weights of a kind and of these sizes have."""
    return sum(math.prod(row.shape(sizes)) for row in KINDS[kind].tensors if row.learned)
