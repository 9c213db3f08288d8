"""Operands for the tests of per-level readouts, and how an implementation is compared with the definition."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llcompile.kernels import choice
from llcompile.kernels.readout_reference import reference_readouts
from llcompile.ops import level_readouts, level_readouts_step

SETS, CHANNELS = 2, 3


def operands(length: int, batch: int = 2, sets: int = SETS, channels: int = CHANNELS, seed: int = 0) -> list[Tensor]:
    """A query and a key."""
    make = torch.Generator().manual_seed(seed)
    return list(torch.randn(2, batch, length, sets, channels, dtype=torch.float64, generator=make))


def old_state(levels: int, *positions: int) -> Tensor:
    """A state whose rows stand at different positions, made by the definition."""
    rows = [reference_readouts(*operands(p, 1, seed=p), levels)[1] for p in positions]
    return torch.cat(rows)


def both(
    query: Tensor, key: Tensor, levels: int, state: Tensor | None = None, final: bool = True, **sequences: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """Readouts, final state and gradients, of the operator and of the definition in float64."""
    results = []
    for function in (level_readouts, reference_readouts):
        leaves = [x.detach().clone() for x in (query, key, state) if x is not None]
        leaves = [(x.double() if function is reference_readouts else x).requires_grad_() for x in leaves]
        more: dict[str, Any] = {"return_final_state": final} if function is level_readouts else {}
        found = list(function(*leaves[:2], levels, *leaves[2:], **more, **sequences))[: 1 + final]
        make = torch.Generator().manual_seed(1)
        grads = [torch.randn(x.shape, dtype=torch.float64, generator=make).to(x) for x in found]
        found += torch.autograd.grad(found, leaves, grads, allow_unused=True, materialize_grads=True)
        results.append([x.detach() for x in found])
    names = ("readouts", *(["state"] if final else []), "query", "key", "initial_state")
    return dict(zip(names, zip(*results, strict=True), strict=False))


def errors(
    length: int, levels: int, *positions: int, batch: int = 2, final: bool = True, **sequences: Tensor
) -> dict[str, float]:
    """The largest difference of a result from the definition by the largest number of that, on Triton in float32."""
    query, key = (x.float() for x in operands(length, batch))
    state = old_state(levels, *positions).float() if positions else None
    with choice.use("triton"):
        found = both(query, key, levels, state, final, **sequences)
    return {n: float((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-9)) for n, (a, b) in found.items()}


def step_error(levels: int, *positions: int) -> float:
    """The largest difference of a step on Triton from one on ATen."""
    query, key = (x[:, 0].float() for x in operands(1, len(positions)))
    results = []
    for kernels in ("triton", "aten"):
        with choice.use(kernels):
            results.append(level_readouts_step(query, key, old_state(levels, *positions).float(), levels))
    return max(float((a - b).abs().max()) for a, b in zip(*results, strict=True))
