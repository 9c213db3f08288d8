"""Interim engine: the recurrence itself (slow). Replaced by the chunked algorithm."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .reference import reference_attention
from .state import state_dtype


class Operands(NamedTuple):
    """The tensors of one call, shapes as in the public function."""

    q: Tensor
    k: Tensor
    v: Tensor
    level_weights: Tensor | None
    log_decay: Tensor | None
    beta: Tensor | None
    initial_state: Tensor | None
    lengths: Tensor | None


def _run(x: Operands, scale: float, final: bool) -> tuple[Tensor, Tensor]:
    mask = None
    if x.lengths is not None:
        mask = torch.arange(x.v.shape[1], device=x.v.device) < x.lengths[:, None]
    dtype = state_dtype(x.v.dtype)
    o, state = reference_attention(*x[:6], scale, x.initial_state, final, attention_mask=mask, dtype=dtype)
    return o.to(x.v.dtype), x.v.new_empty(0, dtype=dtype) if state is None else state.to(dtype)


def forward(x: Operands, scale: float, return_final_state: bool) -> tuple[Tensor, Tensor]:
    """Output and final state (an empty tensor when not asked for)."""
    return _run(x, scale, return_final_state)


def backward(x: Operands, scale: float, grad_o: Tensor, grad_state: Tensor | None) -> list[Tensor | None]:
    """Gradients of the seven operands, None where there is none."""
    below = torch._C._dispatch_tls_local_include_set(), torch._C.DispatchKeySet(torch._C.DispatchKey.Undefined)
    with torch._C._ForceDispatchKeyGuard(*below), torch.enable_grad():
        leaves = [t if t is None else t.detach().requires_grad_(True) for t in x[:7]]
        o, state = _run(Operands(*leaves, x.lengths), scale, grad_state is not None)  # type: ignore[arg-type]
        outs, grads = [o], [grad_o]
        if grad_state is not None:
            outs.append(state)
            grads.append(grad_state)
        wanted = [t for t in leaves if t is not None]
        found = iter(torch.autograd.grad(outs, wanted, grads, allow_unused=True))
        return [None if t is None else next(found) for t in leaves]
