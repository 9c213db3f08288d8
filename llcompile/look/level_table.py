"""Level table: level weights as a table of heads and levels."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import _disable_current_modes

from llcompile.look.mixer_look import LevelTable
from llcompile.torch_internals.dtensors import whole
from llcompile.weights.level_kinds import level_weights_function
from llcompile.weights.level_weights import LevelWeights

_DRAWS = 256


def level_table(weights: LevelWeights, fresh: bool) -> LevelTable:
    """What the weights are over normal inputs: their mean and standard deviation for each head and level.

    Args:
        weights: on any device; on `meta` only fresh ones are known.
        fresh: they were made for this look, so they are 1.
    """
    shape = weights.heads, weights.levels
    with _disable_current_modes(), torch.no_grad():
        if fresh or weights.is_identity():
            return LevelTable(_rows(torch.ones(shape)), _rows(torch.zeros(shape)), identity=True)
        tensors = [tensor for _, tensor in weights.tensors()]
        if any(tensor.is_meta for tensor in tensors):
            return LevelTable()
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(1, _DRAWS, weights.in_features or 1, generator=generator)
        # Of all heads, wherever they are.
        function = level_weights_function(weights.kind, weights.heads, weights.levels, torch.float32)
        w = function(inputs.to(tensors[0].device), *map(whole, tensors))[0].double().cpu()  # [draws, H, L]
    return LevelTable(_rows(w.mean(0)), _rows(w.std(0)))


def _rows(table: torch.Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in table.tolist())
