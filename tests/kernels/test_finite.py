"""NaN, inf and overflows at one token: earlier tokens are what they are without it, in every family."""

from __future__ import annotations

import math

import pytest
import torch

from llcompile.kernels import choice
from llcompile.kernels.aten import sequence
from llcompile.ops import loglinear_attention
from tests.kernels.kernel_cases import operands

FAMILIES = [(None, False), ("token", False), ("head", False), ("channel", False), (None, True), ("channel", True)]
VALUES = [math.nan, math.inf, -math.inf, 1e30]


def spoiled(x, at, value):
    """The operands, with the value in every one of them from token ``at`` of the first row on."""
    changed = dict(x)
    for name in ("q", "k", "v", "level_weights", "beta"):
        if x[name] is not None:
            changed[name] = x[name].clone()
            changed[name][0, at:] = value
    if x["log_decay"] is not None and x["log_decay"].dim() > 2:
        changed["log_decay"] = x["log_decay"].clone()
        changed["log_decay"][0, at:] = -math.inf if abs(value) > 1 else math.nan
    return changed


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("levels", [None, 9])
@pytest.mark.parametrize(("decay", "delta"), FAMILIES)
def test_the_past_is_kept(decay, delta, levels, value):
    """In the chunk of the token, in those before it, and in another row; from there on, nothing is made up."""
    x = operands(150, decay, delta, levels, dtype=torch.float32)
    want, _ = loglinear_attention(**x)
    for at in (100, 3):
        o, _ = loglinear_attention(**spoiled(x, at, value))
        torch.testing.assert_close(o[0, :at], want[0, :at])
        assert torch.equal(o[1], want[1])
        assert not o[0, at:].isfinite().all()


@pytest.mark.parametrize("name", ["q", "k", "v", "level_weights", "log_decay", "beta"])
@pytest.mark.parametrize("state", [None, "level"])
def test_one_operand(name, state):
    """Each of them by itself, in half precision, also where a row continues."""
    x = operands(70, "token", True, 9, state, dtype=torch.bfloat16)
    want, _ = loglinear_attention(**x)
    x[name] = x[name].clone()
    x[name][1, 66, 0] = math.nan
    o, end = loglinear_attention(**x, return_final_state=True)
    torch.testing.assert_close(o[:, :66], want[:, :66])
    assert o[1, 66].isnan().any()
    assert end[0].isfinite().all()
    assert end[1].isnan().any() == (name not in ("q", "level_weights"))


def test_padding_and_neighbours():
    """Garbage in the padding, or in the sequence next to it, reaches no token."""
    x = operands(40, "token", False, 9, dtype=torch.float32)
    mask = torch.ones(2, 40)
    mask[0, 30:] = 0
    want, end = loglinear_attention(**x, attention_mask=mask, return_final_state=True)
    o, found = loglinear_attention(**spoiled(x, 30, math.nan), attention_mask=mask, return_final_state=True)
    assert torch.equal(o, want)
    assert torch.equal(found, end)
    row = {n: a if a is None else a[:1] for n, a in spoiled(x, 30, math.nan).items()}
    clean = {n: a if a is None else a[:1] for n, a in x.items()}
    for bounds, kept in (([0, 30, 40], slice(0, 30)), ([0, 9, 33, 40], slice(0, 30))):
        o, _ = loglinear_attention(**row, cu_seqlens=torch.tensor(bounds))
        want, _ = loglinear_attention(**clean, cu_seqlens=torch.tensor(bounds))
        torch.testing.assert_close(o[:, kept], want[:, kept])
        assert not o[:, 30:].isfinite().any()


def test_it_costs_nothing_where_all_is_finite(monkeypatch):
    """One run, and one more only where the output is not finite."""
    runs = []
    plain = sequence.forward
    monkeypatch.setattr(sequence, "forward", lambda *args: runs.append(1) or plain(*args))
    x = operands(70, dtype=torch.float32)
    with choice.use("aten"):
        loglinear_attention(**x)
        assert len(runs) == 1
        loglinear_attention(**spoiled(x, 60, math.nan))
    assert len(runs) == 3
