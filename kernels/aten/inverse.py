"""The inverse of unit lower triangular matrices, batched."""

from __future__ import annotations

import torch
from torch import Tensor


def unit_lower_inverse(x: Tensor) -> Tensor:
    """``(I + strict_tril(x))^-1`` for ``x [..., C, C]``; what is on and above the diagonal is not looked at."""
    size = x.shape[-1]
    eye = torch.eye(size, dtype=x.dtype, device=x.device).expand(x.shape)
    return torch.linalg.solve_triangular(x, eye, upper=False, unitriangular=True)
