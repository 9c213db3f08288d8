"""The operator's passes on Triton kernels, as `aten.sequence` has them on ATen."""

from __future__ import annotations

import torch
from torch import Tensor

from llcompile.kernels.description import describe
from llcompile.kernels.operands import DIFFERENTIABLE, Operands
from llcompile.kernels.triton import blocks, scan
from llcompile.kernels.triton.call import Call
from llcompile.kernels.triton.description import Description
from llcompile.kernels.triton.schedule import GRADIENTS, OUTPUT, STATES
from llcompile.kernels.triton.segment_call import Make


def forward(x: Operands, scale: float, return_final_state: bool, make: Make = Call) -> tuple[Tensor, Tensor]:
    """Output `[B, T, H, V]` and final state (an empty tensor when not asked for)."""
    if x.decay_rate is not None:
        return scan.forward(x, scale, return_final_state)
    if x.v.numel() and x.q.numel() and blocks.serves(Description.of(describe(x, return_final_state)), *x.v.shape[:3]):
        return blocks.forward(x, scale), x.v.new_empty(0, dtype=torch.float32)
    call = make(per_channel(x), scale, return_final_state)
    if call.empty:
        return x.v.new_zeros(x.v.shape), call.unchanged_state() if return_final_state else call.no_state()
    call.run(STATES | OUTPUT)
    return call.arguments["outputs"], call.final_state() if return_final_state else call.no_state()


def final_state(x: Operands, scale: float, make: Make = Call) -> Tensor:
    """The final state of `x`, which is not empty, without its output."""
    if x.decay_rate is not None:
        return scan.forward(x, scale, True)[1]
    call = make(per_channel(x), scale, True)
    call.run(STATES | {"final_state": OUTPUT["final_state"]})
    return call.final_state()


def backward(
    x: Operands, scale: float, grad_o: Tensor, grad_state: Tensor | None, make: Make = Call
) -> list[Tensor | None]:
    """Gradients of the differentiable operands; None where there is no operand, or no gradient."""
    if x.decay_rate is not None:
        return scan.backward(x, scale, grad_o, grad_state)
    call = make(per_channel(x), scale, grad_state is not None)
    if call.empty:
        if grad_state is None or x.initial_state is None or x.v.shape[0] == 0:
            return [None] * DIFFERENTIABLE
        return [None] * (DIFFERENTIABLE - 1) + [call.unchanged_state_grad(grad_state)]
    call.operand("output_gradient", grad_o)
    if grad_state is not None:
        call.add_final_gradient(grad_state)
    call.run(STATES | GRADIENTS)
    return _operand_gradients(call, x, grad_state)


def per_channel(x: Operands) -> Operands:
    """With a decay for each channel and a factor for each erase key, where there is one.

    There are kernels for these alone: what has an erase key of its own mostly has decays per channel as well.
    """
    if x.erase_key is None:
        return x
    per_head = x.v.shape[:3]
    g = x.v.new_zeros(1) if x.log_decay is None else x.log_decay
    g = g if g.dim() == 4 else g.expand(per_head)[..., None].expand(*per_head, x.q.shape[3])
    return x._replace(log_decay=g, beta=x.v.new_ones(1).expand(per_head) if x.beta is None else x.beta)


def _operand_gradients(call: Call, x: Operands, grad_state: Tensor | None) -> list[Tensor | None]:
    """The buffers as gradients of the operands `x`: summed over heads of a group, or over what has the same decay."""
    found = call.arguments
    q, k = (_of_groups(call, found[name]) for name in ("query_gradients", "key_gradients"))
    v, w, g, beta = (found.get(f"{name}_gradients") for name in ("value", "weight", "decay", "beta"))
    erase_query = erase_key = None
    if call.x.erase_key is not None and call.x.beta is not None:
        erase_query, erased = _of_groups(call, found["erase_query_gradients"]), found["erase_key_gradients"]
        beta = (erased * call.x.erase_key.repeat_interleave(call.d.repeat, 2)).sum(3)
        erase_key = _of_groups(call, erased * call.x.beta[..., None])
    if g is not None and x.log_decay is not None:
        g = g.sum(3) if g.dim() == 4 and x.log_decay.dim() < 4 else g
        g = g.sum((0, 1)) if x.log_decay.dim() == 1 else g
    state = _initial_gradient(call, grad_state)
    return [q, k, v, w, g, None, beta, erase_query, erase_key, state]


def _of_groups(call: Call, grad: Tensor) -> Tensor:
    """Gradients `[B, T, H, K]` summed over the heads of a group; those of one head as they are, without a copy."""
    return grad if call.d.repeat == 1 else grad.unflatten(2, (-1, call.d.repeat)).sum(3)


def _initial_gradient(call: Call, grad_state: Tensor | None) -> Tensor | None:
    """Gradient of the initial state in its own kind; rows without tokens hand the final state's on."""
    s = call.x.initial_state
    if s is None:
        return None
    if not call.d.weighted:
        d: Tensor = call.arguments["initial_gradients"]
        return call._old_grad(d.flatten(0, 1)[:, None])
    d = call._old_grad(call.arguments["old_gradients"].flatten(0, 1))
    if grad_state is not None and call.x.lengths is not None:
        d = d + call.unchanged_state_grad(grad_state - call.with_tokens(grad_state))
    return d
