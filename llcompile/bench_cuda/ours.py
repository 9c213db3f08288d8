"""Our operator as the measurement calls it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.layout import Operands
from ..kernels.state import empty_state
from ..ops import loglinear_attention, loglinear_attention_step
from .cases import LEVELS, Case
from .operands import Tensors

_NAMES = ("q", "k", "v", "level_weights", "log_decay", "beta")


class _Kernels(torch.autograd.Function):
    """The Triton kernels themselves: nothing else can run in their place unseen."""

    @staticmethod
    def forward(ctx: Any, *operands: Tensor | None) -> Tensor:
        from ..kernels.triton import engine

        ctx.save_for_backward(*operands)
        return engine.forward(_operands(operands), 1.0, False)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        from ..kernels.triton import engine

        operands = ctx.saved_tensors
        found = engine.backward(_operands(operands), 1.0, grad, None)
        return tuple(
            None if x is None or g is None else g.to(x.dtype).reshape(x.shape)
            for x, g in zip(operands, found[: len(_NAMES)], strict=True)
        )


def _operands(tensors: Sequence[Any]) -> Operands:
    """The six of :data:`_NAMES`, without an initial state and lengths of rows."""
    q, k, v, w, g, beta = tensors
    return Operands(q, k, v, w, g, beta, None, None)


def attention(x: Tensors) -> Callable[[], Tensor]:
    """A call on a whole sequence, ``o [B, T, H, V]``: Triton on a GPU, the public operator on a CPU."""
    operands = [x.get(name) for name in _NAMES]
    if x["v"].is_cuda:
        return lambda: _Kernels.apply(*operands)  # type: ignore[no-untyped-call]
    return lambda: loglinear_attention(*operands)[0]  # type: ignore[arg-type]


def step(x: Tensors, case: Case) -> Callable[[], object]:
    """A decode step at the case's position, by the public operator; ``x`` holds one token, with an axis T of 1."""
    levels = LEVELS if case.operator == "log-linear" else None
    state = empty_state(case.batch, case.heads, case.key_dim, case.value_dim, levels, device=x["v"].device).normal_()
    if levels is not None:
        state[:, :, 0] = 0
        state[:, :, 0, 0, 0] = case.position
    q, k, v, w, g, beta = (None if (t := x.get(name)) is None else t[:, 0] for name in _NAMES)
    assert q is not None
    assert k is not None
    assert v is not None
    return lambda: loglinear_attention_step(q, k, v, w, state, g, beta)
