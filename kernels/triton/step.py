"""One decoded token on Triton kernels, as `aten.token` has it on ATen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llcompile.kernels import routing_state
from llcompile.kernels.description import describe_step
from llcompile.kernels.operands import Token
from llcompile.kernels.state import in_levels
from llcompile.kernels.triton import autotune, scan
from llcompile.kernels.triton.chips import chip_of
from llcompile.kernels.triton.description import Description
from llcompile.kernels.triton.launch import Launch, kernels_of

# The arguments of each operand: written out here, as a step takes few tens of microseconds.
_OPERANDS = ("query", "key", "value", "weight", "decay", "beta", "erase_query", "erase_key")
_NAMES = tuple((f"{name}_ptr", f"{name}_row", f"{name}_head") for name in _OPERANDS)


def step(token: Token, routing: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `Implementation.step`: the kernel that writes the new state's header writes `routing` there."""
    if token.decay_rate is not None:
        o, state = scan.step(token)
        if routing is not None:
            routing_state.write(state, routing)
        return o, state
    d = Description.of(describe_step(token))
    state = token.state if token.state.dtype == torch.float32 else token.state.float()
    old = in_levels(state, d.levels).contiguous()
    o, new = token.v.new_empty(token.v.shape), torch.empty_like(old)
    known = _arguments(token) | {"old_states": old, "states": new, "outputs": o}
    if d.weighted:
        known |= _routing_arguments(new, routing)
    _launch("decode", d, token, known)
    return o, new


def step_in_place(token: Token, routing: Tensor | None) -> Tensor:
    """As `Implementation.step_in_place`, of a contiguous float32 state: levels that hold something are read, and those
    that change are written."""
    d = Description.of(describe_step(token))
    o = token.v.new_empty(token.v.shape)
    known = _arguments(token) | {"states": token.state, "outputs": o}
    _launch("decode_in_place", d, token, known)
    if d.weighted:
        _launch("count", d, token, known)
        if routing is not None:
            routing_state.write(token.state, routing)
    return o


def _arguments(token: Token) -> dict[str, Any]:
    """Arguments of a kernel but for states and results."""
    q, _, v, _, _, log_decay, _, beta, _, erase_key, scale = token
    batch, heads = v.shape[:2]
    if log_decay is not None and log_decay.dim() == 1:
        log_decay = log_decay.expand(batch, heads)
    if erase_key is not None:  # with decays and factors as `engine.per_channel` has them
        g = v.new_zeros(1, 1) if log_decay is None else log_decay
        log_decay = g if g.dim() == 3 else g.expand(batch, heads)[..., None].expand(*v.shape[:2], q.shape[2])
        beta = v.new_ones(1).expand(batch, heads) if beta is None else beta
    known: dict[str, Any] = {"scale": scale, "heads": heads}
    operands = (q, token.k, v, token.level_weights, log_decay, beta, token.erase_query, erase_key)
    for (pointer, row, head), x in zip(_NAMES, operands, strict=True):
        if x is not None:
            x = x.contiguous() if x.dim() == 3 and x.stride(2) != 1 else x
            known[pointer], known[row], known[head] = x, x.stride(0), x.stride(1)
    return known


def _launch(name: str, d: Description, token: Token, known: dict[str, Any]) -> None:
    batch, heads, value_dim = token.v.shape
    if token.v.numel():
        columns = 0 if name == "count" else value_dim
        autotune.run(Launch(kernels_of(d, chip_of(token.v.device))[name], known, batch * heads, columns))


def _routing_arguments(state: Tensor, routing: Tensor | None) -> dict[str, Any]:
    """Arguments of what goes into the headers of the new state `[B, H, 1 + L, K, V]`; without it they are not read."""
    if routing is None:
        return {"routing_ptr": None, "set_heads": 1, "routing_width": 1, "routing_numbers": 1}
    set_heads, width, numbers = routing_state.shares(state, routing)
    parts = {"set_heads": set_heads, "routing_width": width, "routing_numbers": numbers}
    return {"routing_ptr": routing.contiguous(), **parts}
