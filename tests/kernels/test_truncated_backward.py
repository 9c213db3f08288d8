"""Truncated backpropagation: a cache takes the next state in the memory of the last before the backward pass runs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llcompile.ops import loglinear_attention, loglinear_attention_step
from tests.kernels.kernel_cases import operands

NAMES = ("q", "k", "v", "level_weights", "log_decay", "beta")


def segment(kind: str, x: dict[str, Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
    if kind == "step":
        return loglinear_attention_step(**{n: t[:, 0] for n, t in x.items()}, state=state)
    mask = torch.ones(2, x["q"].shape[1]) if kind == "varlen" else None
    if mask is not None:
        mask[1, -2:] = 0
    o, new = loglinear_attention(**x, initial_state=state, return_final_state=True, attention_mask=mask)
    assert new is not None
    return o, new


def trained(kind: str, in_place: bool) -> list[Tensor]:
    """Gradients of three segments with a state that is detached in between, in one memory or in memory of its own."""
    x = operands(18, "token", True, state="level")
    cache, found = x.pop("initial_state"), []
    assert cache is not None
    for begin in (0, 6, 12):
        inputs = {n: x[n][:, begin : begin + 6].clone().requires_grad_() for n in NAMES}
        o, new = segment(kind, inputs, cache)
        if in_place:
            cache.copy_(new)
        else:
            cache = new
        loss = o.square().sum() + cache[:, :, 1:].square().sum()
        found += torch.autograd.grad(loss, list(inputs.values()))
        cache = cache.detach()
    return found


@pytest.mark.parametrize("kind", ["sequence", "varlen", "step"])
def test_a_cache_that_is_written_in_place(kind: str) -> None:
    found, want = trained(kind, in_place=True), trained(kind, in_place=False)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    assert all(bool(g.abs().max() > 0) for g in found)
