"""The operator's passes on Triton kernels, as `aten.sequence` has them on ATen."""

from __future__ import annotations

from torch import Tensor

from llcompile.kernels.operands import DIFFERENTIABLE, Operands
from llcompile.kernels.triton import scan
from llcompile.kernels.triton.call import Call
from llcompile.kernels.triton.schedule import GRADIENTS, OUTPUT, STATES


def forward(x: Operands, scale: float, return_final_state: bool) -> tuple[Tensor, Tensor]:
    """Output `[B, T, H, V]` and final state (an empty tensor when not asked for)."""
    if x.decay_rate is not None:
        return scan.forward(x, scale, return_final_state)
    call = Call(x, scale, return_final_state)
    if call.empty:
        return x.v.new_zeros(x.v.shape), call.unchanged_state() if return_final_state else call.no_state()
    call.run(STATES)
    call.run(OUTPUT)
    if not return_final_state:
        return call.arguments["outputs"], call.no_state()
    if call.d.weighted:
        return call.arguments["outputs"], call._final(call.arguments["level_states"].flatten(0, 1))
    return call.arguments["outputs"], call.arguments["final_states"]


def backward(x: Operands, scale: float, grad_o: Tensor, grad_state: Tensor | None) -> list[Tensor | None]:
    """Gradients of the differentiable operands; None where there is no operand, or no gradient."""
    if x.decay_rate is not None:
        return scan.backward(x, scale, grad_o, grad_state)
    call = Call(x, scale, grad_state is not None)
    if call.empty:
        if grad_state is None or x.initial_state is None or x.v.shape[0] == 0:
            return [None] * DIFFERENTIABLE
        return [None] * (DIFFERENTIABLE - 1) + [call.unchanged_state_grad(grad_state)]
    call.operand("output_gradient", grad_o)
    if grad_state is not None and call.d.weighted:
        call.arguments["level_gradients"] = call._final_grad(call.with_tokens(grad_state)).contiguous()
    elif grad_state is not None:
        call.arguments["final_gradients"] = grad_state.float().contiguous()
    call.run(STATES)
    call.run(GRADIENTS)
    return _operand_gradients(call, grad_state)


def _operand_gradients(call: Call, grad_state: Tensor | None) -> list[Tensor | None]:
    """The buffers as gradients of the operands: heads of a group summed, a decay per head summed over tokens."""
    found = call.arguments
    q, k = (found[name].unflatten(2, (-1, call.d.repeat)).sum(3) for name in ("query_gradients", "key_gradients"))
    g = found.get("decay_gradients")
    if g is not None and call.x.log_decay is not None and call.x.log_decay.dim() == 1:
        g = g.sum((0, 1))
    state = _initial_gradient(call, grad_state)
    v, w, beta = (found.get(f"{name}_gradients") for name in ("value", "weight", "beta"))
    return [q, k, v, w, g, None, beta, None, None, state]


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
