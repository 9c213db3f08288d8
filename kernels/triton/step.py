"""One decoded token on Triton kernels, as `aten.token` has it on ATen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llcompile.kernels import routing_state
from llcompile.kernels.description import describe_step
from llcompile.kernels.header import DIGITS
from llcompile.kernels.operands import Token
from llcompile.kernels.state import in_levels
from llcompile.kernels.triton import autotune, scan
from llcompile.kernels.triton.chips import chip_of
from llcompile.kernels.triton.description import Description
from llcompile.kernels.triton.launch import Launch, kernels_of


def step(token: Token, routing: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `Implementation.step`: the kernel that writes the new state's header writes `routing` there."""
    if token.decay_rate is not None:
        o, state = scan.step(token)
        if routing is not None:
            routing_state.write(state, routing)
        return o, state
    q, k, v, w, state, log_decay, _, beta, erase_query, erase_key, scale = token
    d = Description.of(describe_step(token))
    batch, heads = v.shape[:2]
    old = in_levels(state.float(), d.levels).contiguous()
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    new = torch.empty_like(old)
    if log_decay is not None and log_decay.dim() == 1:
        log_decay = log_decay.expand(batch, heads)
    if erase_key is not None:  # with decays and factors as `engine.per_channel` has them
        g = v.new_zeros(1, 1) if log_decay is None else log_decay
        log_decay = g if g.dim() == 3 else g.expand(batch, heads)[..., None].expand(*v.shape[:2], q.shape[2])
        beta = v.new_ones(1).expand(batch, heads) if beta is None else beta
    known: dict[str, Any] = {"old_states": old, "states": new, "outputs": o, "scale": scale, "heads": heads}
    if d.weighted:
        known |= _routing_arguments(new, routing)
    operands = {"query": q, "key": k, "value": v, "weight": w, "decay": log_decay, "beta": beta}
    operands |= {"erase_query": erase_query, "erase_key": erase_key}
    for name, x in operands.items():
        if x is None:
            continue
        x = x.contiguous() if x.dim() == 3 and x.stride(2) != 1 else x
        known |= {f"{name}_ptr": x, f"{name}_row": x.stride(0), f"{name}_head": x.stride(1)}
    if o.numel():
        autotune.run(Launch(kernels_of(d, chip_of(v.device))["decode"], known, batch * heads, d.value_dim))
    return o, new


def _routing_arguments(state: Tensor, routing: Tensor | None) -> dict[str, Any]:
    """Arguments of what goes into the headers of the new state `[B, H, 1 + L, K, V]`; without it they are not read."""
    if routing is None:
        return {"routing_ptr": None, "set_heads": 1, "routing_width": 1, "routing_numbers": 1}
    routing_state.check_written(state, routing)
    _, sets, size = routing.shape
    numbers = size - DIGITS
    set_heads, width = routing_state.layout(state, sets, numbers)
    parts = {"set_heads": set_heads, "routing_width": width, "routing_numbers": numbers}
    return {"routing_ptr": routing.contiguous(), **parts}
