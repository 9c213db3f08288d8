"""Batches with padding."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.models import tiny

LENGTHS = (21, 9)


def padded(side: str, lengths: tuple[int, ...] = LENGTHS) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Token ids and mask [B, T], and the sequences by themselves."""
    rows = [tiny.tokens(1, length, seed=length) for length in lengths]
    ids, mask = torch.zeros(len(rows), max(lengths), dtype=torch.long), torch.zeros(len(rows), max(lengths)).long()
    for row, sequence in enumerate(rows):
        place = slice(max(lengths) - sequence.shape[1], None) if side == "left" else slice(sequence.shape[1])
        ids[row, place], mask[row, place] = sequence[0], 1
    return ids, mask, rows
