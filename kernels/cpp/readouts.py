"""Per-level readouts in C++: one pass over the tokens of each sequence, with the sums of the levels at hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llcompile.errors import KernelError
from llcompile.kernels import header, routing_state
from llcompile.kernels.cpp.call import operand, pointer, token_operand
from llcompile.kernels.cpp.family import readout_functions
from llcompile.kernels.cpp.readout_call import Call, Step
from llcompile.kernels.readouts import Readouts, ReadoutToken


def forward(x: Readouts, return_final_state: bool) -> tuple[Tensor, Tensor]:
    """As `aten.readouts.forward`."""
    readouts = _for_tokens(x, x.levels, x.dtype)
    state = x.query.new_empty(0, dtype=x.dtype)
    if return_final_state:
        state = torch.empty(x.rows, x.query.shape[2], routing_state.size(x.levels, x.query.shape[3]), dtype=x.dtype)
        position = torch.full((x.rows,), x.query.shape[1]) if x.lengths is None else x.lengths
        position = position if x.position is None else position + x.position
        state[:, :, : header.DIGITS] = header.write(position, header.DIGITS, 1, x.dtype)[:, None, :, 0]
    final = pointer(state) if return_final_state else None
    _run(x, "forward", output=operand(readouts), final_state=final)
    return readouts, state


def backward(x: Readouts, grad: Tensor, grad_state: Tensor | None) -> tuple[Tensor | None, ...]:
    """As `aten.readouts.backward`."""
    d_query, d_key = (_for_tokens(x, x.query.shape[3], x.query.dtype) for _ in range(2))
    d_state = None if x.initial_state is None else torch.zeros(x.initial_state.shape, dtype=x.dtype)
    grad, grad_state = grad.to(x.dtype), None if grad_state is None else grad_state.to(x.dtype).contiguous()
    gradients = {"query_gradient": operand(d_query), "key_gradient": operand(d_key)}
    states = {"final_state": pointer(grad_state), "initial_gradient": pointer(d_state)}
    _run(x, "backward", output=operand(grad), **gradients, **states)
    return d_query, d_key, d_state


def step(x: ReadoutToken) -> tuple[Tensor, Tensor]:
    """As `aten.readouts.step`."""
    (batch, sets, channels), dtype = x.query.shape, x.dtype
    state = x.state.to(dtype).contiguous()
    readouts = torch.empty(batch, sets, x.levels, dtype=dtype)
    new = torch.empty(batch, sets, routing_state.size(x.levels, channels), dtype=dtype)
    if not batch or not sets:
        return readouts, new
    where = (state.stride(0), state.stride(1), *routing_state.layout(state, sets, x.levels * channels))
    pointers = map(pointer, (state, new, readouts))
    call = Step(*map(token_operand, (x.query, x.key)), *pointers, *where, batch, sets, x.levels, channels)
    result = readout_functions(dtype).step(call)
    if result < 0:
        routing_state.check_position(state, 1, "state")
    if result:
        raise KernelError(f"the C++ step of readouts failed with code {result}: no memory was left")
    return readouts, new


def _for_tokens(x: Readouts, columns: int, dtype: torch.dtype) -> Tensor:
    """Memory for a result with tokens: zeros where some may belong to no sequence."""
    return (torch.empty if x.lengths is None else torch.zeros)((*x.query.shape[:3], columns), dtype=dtype)


def _run(x: Readouts, name: str, **fields: Any) -> None:
    """Run an entry point; raises `KernelError` where it ran out of memory."""
    tables = [None if t is None else t.to(torch.int64).contiguous() for t in (x.starts, x.lengths, x.position)]
    initial = None if x.initial_state is None else x.initial_state.to(x.dtype).contiguous()
    _, tokens, sets, channels = x.query.shape
    call = Call(
        query=operand(x.query),
        key=operand(x.key),
        **dict(zip(("starts", "lengths", "positions"), map(pointer, tables), strict=True)),
        initial=pointer(initial),
        **{"sequences": x.rows, "tokens": tokens, "sets": sets, "levels": x.levels, "channels": channels},
        **fields,
    )
    if getattr(readout_functions(x.dtype), name)(call):
        raise KernelError(f"the C++ {name} of readouts ran out of memory; use a smaller batch or a shorter sequence")
