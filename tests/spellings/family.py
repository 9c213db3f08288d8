"""What a spelling must compute: the definition in float64, on the operands that it names itself."""

from __future__ import annotations

import torch
from torch import Tensor

from llcompile.kernels.reference import reference_attention
from tests.spellings.registry import Operands


def expected(operands: Operands, level_weights: Tensor | None = None) -> Tensor:
    """The family's output [B, T, H * V], normalised where the operands say so."""
    given = dict(operands)
    normaliser = given.pop("normaliser", None)
    if normaliser is not None:
        given["v"] = torch.cat([given["v"], torch.ones_like(given["v"][..., :1])], -1)
    o, _ = reference_attention(**given, level_weights=level_weights)
    if normaliser is not None:
        o = o[..., :-1] / normaliser(o[..., -1:])
    return o.flatten(2)
