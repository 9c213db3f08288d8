"""Agreement: how near two programs must be in a proof, and whether they have the same gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

# (precision, largest relative difference) of programs run in float64, the strictest first: one that computes in
# it throughout agrees to rounding; one that casts to float32 inside, or holds float32 numbers, to float32's.
BUDGETS = (("float64", 1e-10), ("float32", 2e-5))
_SLIGHT = 1e-6  # of the largest gradient: what is smaller is compared with this


def gradients(result: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Gradients of a fixed function of a result; zeros where it does not depend on a leaf.

    Raises:
        RuntimeError, NotImplementedError: it has no backward.
    """
    if not result.requires_grad:
        return [torch.zeros_like(x) for x in leaves]
    weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    loss = (result * weights.to(result.device, result.dtype)).sum()
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)]


def apart(theirs: Iterable[Tensor], ours: Iterable[Tensor]) -> float:
    """The largest difference of two lists of gradients, each relative to its larger one; inf if not finite."""
    pairs = [(one.double(), two.double()) for one, two in zip(theirs, ours, strict=True)]
    sizes = [max(_size(one), _size(two)) for one, two in pairs]
    if not all(math.isfinite(_size(x)) for pair in pairs for x in pair):
        return math.inf
    least = max(_SLIGHT * max(sizes, default=0.0), 1e-300)
    return max(
        (_size(one - two) / max(size, least) for (one, two), size in zip(pairs, sizes, strict=True)), default=0.0
    )


def _size(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0
