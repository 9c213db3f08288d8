"""Tokens that are not in a state yet, on Triton kernels: one is read of them and of the state, or all go into it.

Of the state, only levels that hold something are read.
"""

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
    d, known = _call(x, occupied)
    batch, _, heads, value_dim = x.v.shape
    o = x.v.new_empty(batch, 1, heads, value_dim)
    _launch("replay", d, x, known | {"outputs": o, "scale": float(scale)}, batch * heads)
    return o


def fold(x: Operands, occupied: Tensor | None, merged: bool) -> Tensor:
    """As `Implementation.fold`: a program for each level of a head, and one for the header."""
    d, known = _call(x, occupied)
    batch, _, heads, _ = x.v.shape
    state = torch.empty_like(known["old_states"])
    slots = 1 if d.levels is None else 1 + d.levels
    _launch("fold", d, x, known | {"states": state, "merged": int(merged)}, batch * heads * slots)
    return state


def _call(x: Operands, occupied: Tensor | None) -> tuple[Description, dict[str, Any]]:
    """The description and the arguments that both have."""
    assert x.initial_state is not None
    d = Description.of(dataclasses.replace(describe(x, False), initial_state="none"))
    state = in_levels(x.initial_state.float(), d.levels).contiguous()
    known: dict[str, Any] = {"old_states": state, "heads": x.v.shape[2], "tokens": x.v.shape[1]}
    known["occupied_ptr"] = _all(state) if occupied is None else occupied.contiguous()
    x = per_channel(x)
    operands = {"query": x.q, "key": x.k, "value": x.v, "weight": x.level_weights, "decay": x.log_decay}
    operands |= {"beta": x.beta, "erase_query": x.erase_query, "erase_key": x.erase_key}
    for name, t in operands.items():
        if t is not None:
            known |= operand_arguments(name, t, x.v.shape)
    return d, known


def _launch(name: str, d: Description, x: Operands, known: dict[str, Any], programs: int) -> None:
    if x.v[:, :1].numel():
        autotune.run(Launch(kernels_of(d, chip_of(x.v.device))[name], known, programs, x.v.shape[3]))


def _all(state: Tensor) -> Tensor:
    """All levels are read, where it is not known which hold something."""
    return torch.ones(state.shape[0], max(state.shape[2] - 1, 1), device=state.device)
