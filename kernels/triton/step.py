"""One decoded token on Triton kernels, as :mod:`..step` has it on ATen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llcompile.kernels.state import is_level_state, linear_state, pack_state
from llcompile.kernels.triton import autotune
from llcompile.kernels.triton.chips import chip_of
from llcompile.kernels.triton.description import describe_step
from llcompile.kernels.triton.launch import Launch, kernels_of


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor | None,
    state: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Absorb one token and read out: arguments and results of :func:`..step.step`."""
    d = describe_step(q, v, w, log_decay, beta)
    batch, heads = v.shape[:2]
    old = _as_kind(state.float(), d.levels).contiguous()
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    new = torch.empty_like(old)
    if log_decay is not None and log_decay.dim() == 1:
        log_decay = log_decay.expand(batch, heads)
    known: dict[str, Any] = {"old_states": old, "states": new, "outputs": o, "scale": scale, "heads": heads}
    operands = {"query": q, "key": k, "value": v, "weight": w, "decay": log_decay, "beta": beta}
    for name, x in operands.items():
        if x is None:
            continue
        x = x.contiguous() if x.dim() == 3 and x.stride(2) != 1 else x
        known |= {f"{name}_ptr": x, f"{name}_row": x.stride(0), f"{name}_head": x.stride(1)}
    if o.numel():
        autotune.run(Launch(kernels_of(d, chip_of(v.device))["decode"], known, batch * heads, d.value_dim))
    return o, new


def _as_kind(state: Tensor, levels: int | None) -> Tensor:
    """The state with levels, or without: a linear state is one bucket of the last level, at position 0."""
    if levels is None:
        return linear_state(state)
    if is_level_state(state):
        return state
    spread = state.new_zeros(*state.shape[:2], levels, *state.shape[2:])
    spread[:, :, -1] = state
    return pack_state(spread, torch.zeros(state.shape[0], device=state.device))
