"""Learned weights over positions: the token MLP of MLP-Mixer and gMLP, the low-rank projections of Linformer."""

from __future__ import annotations

from collections.abc import Iterator

from llcompile.patterns.mechanisms.facts import Facts, node_of
from llcompile.patterns.mechanisms.found import Found
from llcompile.patterns.structure.program import Value


def find(facts: Facts) -> Iterator[Found]:
    """Every sum over positions with learned weights."""
    for value in facts.values:
        if weighs_positions(facts, value):
            yield Found(node_of(value), "time mixing by a weight (MLP-Mixer)", frozenset((value,)))


def weighs_positions(facts: Facts, value: Value) -> bool:
    """Whether a value is a sum over positions with learned weights."""
    operands = facts.projected(value)
    if operands is None or operands[1] not in facts.learned or value.op is None or facts.names[value] == "embedding":
        return False
    if facts.names[value] == "convolution":  # a kernel of one number, along what is not time, sums over the channels
        return operands[1].shape[2:] == (1,) and facts.times.along(operands[0], 1)
    return facts.times.mixes(value.op)
