"""The inverse of unit lower triangular matrices, batched."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor


def unit_lower_inverse(x: Tensor) -> Tensor:
    """`(I + strict_tril(x))^-1` for `x [..., C, C]`; what is on and above the diagonal is not looked at."""
    return cast(Tensor, _UnitLowerInverse.apply(x))


class _UnitLowerInverse(torch.autograd.Function):
    """Its own gradient: two products where autograd's solves a system again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device).expand(x.shape)
        inverse = torch.linalg.solve_triangular(x, eye, upper=False, unitriangular=True)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Tensor:  # type: ignore[override]
        (inverse,) = ctx.saved_tensors
        return (inverse.mT @ d @ inverse.mT).neg_().tril_(-1)
