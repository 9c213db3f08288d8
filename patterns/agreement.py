"""Agreement: how far two programs are apart, and how far they may be. Every proof and comparison measures with this."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

# What rounds in two programs that are one -> the largest difference between them.
BUDGETS = {
    "float64": 1e-10,  # they compute in it throughout
    "float32 constants": 1e-6,  # in float64, with numbers that the code holds in float32
    "float32": 2e-5,  # one casts to it inside
    "tf32": 5e-3,
    "bfloat16": 2e-2,
}
EXACT = ("float64", "float32")  # what a proof in float64 may come down to, the strictest first
_SLIGHT = 1e-6  # of the largest of all: what is smaller is compared with this


def difference(theirs: Tensor, ours: Tensor) -> float:
    """The largest difference of two results [T, ...], at each position relative to the original's largest value there.

    Positions where that is slight are compared with 1e-6 of the largest value of all. Inf where it is not finite.
    """
    if theirs.shape != ours.shape:
        return math.inf
    return _relative((theirs - ours).flatten(1).abs().amax(1), theirs.flatten(1).abs().amax(1), _SLIGHT)


def apart(theirs: Iterable[Tensor], ours: Iterable[Tensor], slight: float = _SLIGHT) -> float:
    """The same for tensors of any shapes: each of them, a gradient say, stands for one position."""
    pairs = list(zip(theirs, ours, strict=True))
    if any(one.shape != two.shape for one, two in pairs):
        return math.inf
    return _relative(_sizes(one - two for one, two in pairs), _sizes(one for one, _ in pairs), slight)


def precision(error: float, precisions: Iterable[str] = EXACT) -> str:
    """The first of these precisions that explains an error, which the last one does."""
    return next(name for name in precisions if error <= BUDGETS[name])


def gradients(results: Iterable[Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of a fixed function of all results; zeros where it does not depend on a leaf.

    Raises:
        RuntimeError, NotImplementedError: a result has no backward.
    """
    drawn = torch.Generator().manual_seed(7)
    weighed = [(x, torch.randn(x.shape, generator=drawn, dtype=torch.float64)) for x in results]
    losses = [(x * weights.to(x.device, x.dtype)).sum() for x, weights in weighed if x.requires_grad]
    if not losses:
        return [torch.zeros_like(x) for x in leaves]
    found = torch.autograd.grad(losses, leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)]


@contextmanager
def undisturbed() -> Iterator[None]:
    """What runs inside is no part of a trace, takes no gradients, is not cast, and makes its tensors on the CPU."""
    with _disable_current_modes(), torch.no_grad(), torch.autocast("cpu", enabled=False), torch.device("cpu"):
        yield


def _sizes(tensors: Iterable[Tensor]) -> Tensor:
    return torch.tensor([float(x.abs().max()) if x.numel() else 0.0 for x in tensors], dtype=torch.float64)


def _relative(errors: Tensor, sizes: Tensor, slight: float) -> float:
    if not sizes.numel():
        return 0.0
    sizes = sizes.double()
    error = float((errors.double() / sizes.clamp_min(max(slight * float(sizes.max()), 1e-300))).max())
    return error if math.isfinite(error) else math.inf
