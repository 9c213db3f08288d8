"""Operands for the tests of per-level readouts, and how an implementation is compared with the definition."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from llcompile.kernels import choice, routing_state
from llcompile.kernels.readout_reference import reference_readouts
from llcompile.kernels.state import pack_state
from llcompile.ops import level_readouts, level_readouts_step, loglinear_attention_step

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


def mixer_step_error(heads: int, key_dim: int, value_dim: int) -> float:
    """The largest difference on Triton from ATen of a mixer's token whose readouts lie in its state, old and new."""
    make, levels = torch.Generator().manual_seed(0), 5
    draw: Any = partial(torch.randn, generator=make)
    query, key = (x[:, 0].float() for x in operands(1))
    state = pack_state(draw(2, heads, levels, key_dim, value_dim), torch.tensor([5, 64]))
    routing_state.write(state, draw(2, SETS, routing_state.size(levels, CHANNELS)))
    q, k, v = *draw(2, 2, 1, key_dim), draw(2, heads, value_dim)
    results = []
    for kernels in ("triton", "aten"):
        with choice.use(kernels):
            read, new = level_readouts_step(query, key, state, levels)
            found = loglinear_attention_step(q, k, v, 1 + read, state, routing_state=new)
            without = loglinear_attention_step(q, k, v, 1 + read, state)
        assert not torch.equal(found[1], without[1])  # the routing state is there
        assert torch.equal(routing_state.read(found[1], SETS, levels, CHANNELS)[:, :, 8:], new[:, :, 8:])
        results.append((read, new, *found, without[1]))
    return max(float((a - b).abs().max()) for a, b in zip(*results, strict=True))


def long_errors(length: int, *positions: int, packed: bool = False) -> dict[str, float]:
    """As `errors` for one set and many chunks, from ATen in float64, which is quick: its definition takes minutes."""
    levels = 13
    results = []
    for kernels, dtype in (("triton", torch.float32), ("aten", torch.float64)):
        query, key = (x.to(dtype).requires_grad_() for x in operands(length, 1, 1))
        state = None
        if positions:
            with choice.use("aten"):
                state = level_readouts(*operands(*positions, 1, 1), levels, return_final_state=True)[1].to(dtype)
        bounds = torch.tensor([0, 1, 40, 40, length]) if packed else None
        with choice.use(kernels):
            readouts, final = level_readouts(query, key, levels, state, return_final_state=True, cu_seqlens=bounds)
            grad = torch.linspace(-1, 1, readouts.numel(), dtype=dtype).reshape(readouts.shape)
            grads = torch.autograd.grad(readouts, (query, key), grad)
        results.append((readouts.detach(), final, *grads))
    names = ("readouts", "state", "query", "key")
    pairs = dict(zip(names, zip(*results, strict=True), strict=True))
    return {n: float((a.double() - b).abs().max() / b.abs().max()) for n, (a, b) in pairs.items()}
