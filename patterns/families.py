"""The table of families: one entry for each cell of decay x correction (docs/operator.md has the recurrences)."""

from __future__ import annotations

from typing import Literal

Decay = Literal["none", "scalar", "channel"]
Correction = Literal["none", "delta", "erase"]

# The name that the field gives to the cell when the code at hand does not say more.
FAMILIES: dict[tuple[Decay, Correction], str] = {
    ("none", "none"): "linear attention",
    ("scalar", "none"): "scalar-decay linear attention",
    ("channel", "none"): "gated linear attention",
    ("none", "delta"): "DeltaNet",
    ("scalar", "delta"): "Gated DeltaNet",
    ("channel", "delta"): "Kimi Delta Attention",
    ("none", "erase"): "DeltaNet with an erase key",
    ("scalar", "erase"): "Comba",
    ("channel", "erase"): "RWKV-7",
}

# The channel cell where its log decays are a token's step times a rate per channel, and its heads are of width one.
SELECTIVE_SCAN = "Mamba-1 (selective scan)"
