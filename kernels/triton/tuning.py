"""How each kernel is launched: the width of its value tile, its warps and its pipeline stages."""

from __future__ import annotations

from typing import NamedTuple

from .description import Description, tile


class Tuning(NamedTuple):
    """Launch parameters of one kernel."""

    value_tile: int
    warps: int
    stages: int


# Kernel: widest value tile, warps, stages. Chosen so that nothing spills at K, V <= 128 (see check.py).
_DEFAULT = {
    "chunk_scores": (128, 4, 1),
    "chunk_inverse": (128, 4, 1),
    "chunk_state": (128, 8, 1),
    "tree_up": (32, 4, 1),
    "state_scan": (16, 4, 2),
    "output": (64, 8, 1),
    "final_state": (64, 8, 1),
    "read_gradient": (64, 8, 1),
    "state_gradient": (64, 8, 1),
    "transition_gradient": (128, 8, 1),
    "old_state_gradient": (64, 8, 1),
    "final_state_gradient": (32, 8, 1),
    "final_chunk_gradient": (64, 8, 1),
    "tree_down": (64, 8, 1),
    "transition_down": (64, 8, 1),
    "scan_gradient": (16, 4, 2),
    "chunk_values_gradient": (64, 8, 1),
    "chunk_transition_gradient": (64, 8, 1),
    "chunk_reader_gradient": (128, 8, 1),
    "chunk_writer_gradient": (128, 8, 1),
    "chunk_delta_gradient": (128, 8, 1),
    "chunk_gradient": (128, 8, 1),
    "decode": (32, 4, 1),
    "chunk_scores_gradient": (128, 8, 1),
}
# The same where a family differs from the others.
_OF_FAMILY = {("chunk_gradient", "channel", "none"): (128, 4, 1)}


def tuning(kernel: str, d: Description) -> Tuning:
    """Launch parameters of ``kernel`` for ``d``."""
    widest, warps, stages = _OF_FAMILY.get((kernel, d.decay, d.correction), _DEFAULT[kernel])
    return Tuning(min(widest, tile(d.value_dim)), warps, stages)
