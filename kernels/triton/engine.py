"""The operator's passes on Triton kernels, as :mod:`..engine` has them on ATen."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import Operands
from .call import Call


def forward(x: Operands, scale: float, return_final_state: bool) -> tuple[Tensor, Tensor]:
    """Output ``[B, T, H, V]`` and final state (an empty tensor when not asked for)."""
    call = Call(x, scale, return_final_state)
    chunk_stage(call)
    if call.d.weighted:
        tree(call)
    else:
        scan(call)
    o = call.buffer("outputs", *x.v.shape, dtype=x.v.dtype)
    if call.d.padded:
        o.zero_()
    call.launch("output", call.lanes * call.chunks, tiled=True)
    state = call.values.get("final_states")
    return o, x.v.new_empty(0, dtype=torch.float32) if state is None else state


def chunk_stage(call: Call) -> None:
    """Phase 1: what each chunk adds to the state and does to one that passes it."""
    d, lanes, chunks = call.d, call.lanes, call.chunks
    square = (lanes, chunks, d.chunk, d.chunk)
    if d.decay == "channel":
        call.buffer("query_squares", *square)
        if d.delta:
            call.buffer("key_squares", *square)
        call.launch("chunk_scores", lanes * chunks)
    if d.delta:
        call.buffer("mixes", *square)
        call.launch("chunk_mix", lanes * chunks)
        call.buffer("transitions", 2, lanes, chunks, d.key_dim, d.key_dim)
    if d.decay != "none":
        call.buffer("totals", 2, lanes, chunks, *((d.key_dim,) if d.decay == "channel" else ()))
    call.buffer("states", lanes, chunks, d.key_dim, d.value_dim)
    call.launch("chunk_state", lanes * chunks, tiled=True)


def tree(call: Call) -> None:
    """Phase 2, log-linear: blocks pair up, level by level."""
    for level in range(call.depth - 1):
        pairs = call.chunks >> (level + 1)
        call.launch("tree_up", call.lanes * pairs, tiled=True, pairs=pairs, level=level)


def scan(call: Call) -> None:
    """Phase 2, linear: one state, chunk after chunk."""
    if call.d.final_state:
        call.buffer("final_states", call.batch, call.heads, call.key_dim, call.value_dim)
    call.launch("state_scan", call.lanes, tiled=True)
