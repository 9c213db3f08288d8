"""Operands for the operator's tests, and how two results are compared."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from llcompile.kernels.operands import DIFFERENTIABLE
from llcompile.kernels.operands import Operands as _Operands
from llcompile.kernels.reference import reference_attention
from llcompile.ops import loglinear_attention

NAMES = _Operands._fields[:DIFFERENTIABLE]
DECAYS = (None, "head", "token", "channel", "rate")
Operands = dict[str, Tensor | None]


def operands(
    length: int,
    decay: str | None = "token",
    delta: bool | Literal["erase"] = False,
    levels: int | None = 12,
    state: str | None = None,
    batch: int = 2,
    groups: int = 2,
    heads: int = 4,
    key_dim: int = 5,
    value_dim: int = 3,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Operands:
    """Random operands; keys have unit length so that the delta rule contracts, and an erase key nearly does."""
    make = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=make)

    q, k = normal(batch, length, groups, key_dim), normal(batch, length, groups, key_dim)
    k = torch.nn.functional.normalize(k, dim=-1)
    x: Operands = {"q": q, "k": k, "v": normal(batch, length, heads, value_dim)}
    x["level_weights"] = None if levels is None else normal(batch, length, heads, levels)
    shapes = {"head": (heads,), "token": (batch, length, heads), "channel": (batch, length, heads, key_dim)}
    shape = shapes["token" if decay == "rate" else decay] if decay else ()
    x["log_decay"] = None if decay is None else -normal(*shape).abs() * 0.2
    x["decay_rate"] = 2 * torch.rand(heads, key_dim, dtype=torch.float64, generator=make) if decay == "rate" else None
    x["beta"] = 2 * torch.rand(batch, length, heads, dtype=torch.float64, generator=make) if delta else None
    x["erase_query"] = x["erase_key"] = None
    if delta == "erase":
        x["erase_query"] = torch.nn.functional.normalize(normal(batch, length, groups, key_dim), dim=-1)
        x["erase_key"] = 0.5 * x["erase_query"] + 0.1 * normal(batch, length, groups, key_dim)
    x["initial_state"] = None
    if state == "linear":
        x["initial_state"] = normal(batch, heads, key_dim, value_dim)
    if state == "level":
        x["initial_state"] = level_state(normal, batch, heads, key_dim, value_dim, levels or 4)
    return {n: t if t is None else t.to(dtype) for n, t in x.items()}


def level_state(normal, batch: int, heads: int, key_dim: int, value_dim: int, levels: int) -> Tensor:  # type: ignore[no-untyped-def]
    """A level state whose rows stand at different positions, made by running the definition up to there."""
    rows = []
    for position in (13, 70, 7, 0)[:batch]:
        q, k = normal(1, position, 1, key_dim), normal(1, position, 1, key_dim)
        w, v = normal(1, position, heads, levels), normal(1, position, heads, value_dim)
        final = reference_attention(q, k, v, w, return_final_state=True)[1]
        assert final is not None
        rows.append(final)
    return torch.cat(rows)


def both(x: Operands, scale: float = 0.7, **options: object) -> dict[str, tuple[Tensor, Tensor]]:
    """Output, final state and all gradients, of the operator and of the definition."""
    results = []
    for function in (loglinear_attention, reference_attention):
        leaves = {n: t if t is None else t.detach().clone().requires_grad_() for n, t in x.items()}
        if function is reference_attention:
            leaves = {n: t if t is None else t.detach().double().requires_grad_() for n, t in leaves.items()}
        o, state = function(**leaves, scale=scale, return_final_state=True, **options)  # type: ignore[arg-type]
        assert state is not None
        make = torch.Generator().manual_seed(1)
        grads = [torch.randn(t.shape, dtype=torch.float64, generator=make).to(t.dtype) for t in (o, state)]
        wanted = {n: t for n, t in leaves.items() if t is not None}
        found = torch.autograd.grad([o, state], list(wanted.values()), grads, allow_unused=True)
        results.append({"o": o.detach(), "state": state.detach(), **dict(zip(wanted, found, strict=True))})
    ours, definition = results
    return {n: (ours[n], definition[n]) for n in ours if definition[n] is not None and definition[n].numel()}


def relative_error(ours: Tensor, definition: Tensor) -> float:
    """Largest difference by the largest value of the definition."""
    scale = definition.abs().max().clamp(min=1e-30)
    return float((ours.double() - definition.double()).abs().max() / scale)


def assert_agrees(x: Operands, tolerance: float = 1e-10, **options: object) -> None:
    """The operator and the definition agree in everything."""
    for name, (ours, definition) in both(x, **options).items():  # type: ignore[arg-type]
        assert torch.isfinite(ours).all(), f"{name} is not finite"
        assert relative_error(ours, definition) <= tolerance, f"{name}: {relative_error(ours, definition):.2e}"
