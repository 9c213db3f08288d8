"""One token read of a state and of the tokens since, on Triton kernels; only levels that hold something are read."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from llcompile.kernels.description import describe
from llcompile.kernels.operands import Operands
from llcompile.kernels.state import in_levels
from llcompile.kernels.triton import autotune
from llcompile.kernels.triton.buffers import operand_arguments
from llcompile.kernels.triton.chips import chip_of
from llcompile.kernels.triton.description import Description
from llcompile.kernels.triton.engine import per_channel
from llcompile.kernels.triton.launch import Launch, kernels_of


def replay(x: Operands, occupied: Tensor | None, scale: float) -> Tensor:
    """What the last token reads: `q [B, 1, G, K]`, `level_weights [B, 1, H, L]`, the other operands of n tokens."""
    assert x.initial_state is not None
    d = Description.of(dataclasses.replace(describe(x, False), initial_state="none"))
    x = per_channel(x)
    batch, heads, value_dim = x.v.shape[0], x.v.shape[2], x.v.shape[3]
    state = in_levels(x.initial_state.float(), d.levels).contiguous()  # type: ignore[union-attr]
    o = x.v.new_empty(batch, 1, heads, value_dim)
    known: dict[str, Any] = {"old_states": state, "outputs": o, "scale": float(scale), "heads": heads}
    known |= {"tokens": x.v.shape[1], "occupied_ptr": _all(state) if occupied is None else occupied.contiguous()}
    operands = {"query": x.q, "key": x.k, "value": x.v, "weight": x.level_weights, "decay": x.log_decay}
    operands |= {"beta": x.beta, "erase_query": x.erase_query, "erase_key": x.erase_key}
    for name, t in operands.items():
        if t is not None:
            known |= operand_arguments(name, t, x.v.shape)
    if o.numel():
        autotune.run(Launch(kernels_of(d, chip_of(x.v.device))["replay"], known, batch * heads, value_dim))
    return o


def _all(state: Tensor) -> Tensor:
    """All levels are read, where it is not known which hold something."""
    return torch.ones(state.shape[0], max(state.shape[2] - 1, 1), device=state.device)
