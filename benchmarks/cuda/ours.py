"""Our operator as the measurement calls it: by its public face, host work included."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.cuda.cases import LEVELS, Case
from benchmarks.cuda.operands import Tensors
from llcompile.kernels.state import empty_state, pack_state
from llcompile.ops import loglinear_attention, loglinear_attention_step

_NAMES = ("q", "k", "v", "level_weights", "log_decay", "beta")


def attention(x: Tensors) -> Callable[[], Tensor]:
    """A call on a whole sequence, ``o [B, T, H, V]``."""
    operands = [x.get(name) for name in _NAMES]
    return lambda: loglinear_attention(*operands)[0]  # type: ignore[arg-type]


def step(x: Tensors, case: Case) -> Callable[[], object]:
    """A decode step at the case's position; ``x`` holds one token, with an axis T of 1."""
    levels = LEVELS if case.operator == "log-linear" else None
    state = empty_state(case.batch, case.heads, case.key_dim, case.value_dim, levels, device=x["v"].device)
    state.normal_()
    if levels is not None:
        state[:, :, 1:] *= _held(case.position, levels, state.device)[:, None, None]
        state = pack_state(state[:, :, 1:], torch.full((case.batch,), case.position, device=state.device))
    q, k, v, w, g, beta = (None if (t := x.get(name)) is None else t[:, 0] for name in _NAMES)
    assert q is not None
    assert k is not None
    assert v is not None
    return lambda: loglinear_attention_step(q, k, v, w, state, g, beta)


def _held(position: int, levels: int, device: torch.device) -> Tensor:
    """``[L]``: 1 at the levels that hold something after ``position`` tokens, as their last query saw them."""
    last = position - 1
    held = [1.0] + [float(last >> (level - 1) & 1) for level in range(1, levels)]
    return torch.tensor(held, device=device)
