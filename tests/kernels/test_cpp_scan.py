"""The scan in C++, for a decay by rates: blocks of heads, checkpoints, threads, memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from llcompile.errors import KernelError
from llcompile.kernels import choice
from llcompile.kernels.cpp import engine
from llcompile.ops import loglinear_attention
from tests.kernels.kernel_cases import Operands, assert_agrees, both, operands, relative_error


@pytest.fixture(autouse=True)
def _cpp():
    with choice.use("cpp"):
        yield


def _gradients(x: Operands) -> list[torch.Tensor]:
    return [ours for ours, _ in both(x).values()]


@pytest.mark.parametrize(("groups", "heads", "value_dim"), [(1, 1, 1), (1, 20, 1), (2, 34, 1), (3, 3, 2), (1, 16, 5)])
def test_blocks_of_heads(groups, heads, value_dim):
    """Heads are lanes of vectors: fewer than a block, several blocks, a part of one, and blocks within groups."""
    for levels in (None, 6):
        x = operands(40, "rate", False, levels, "linear", batch=1, groups=groups, heads=heads, value_dim=value_dim)
        assert_agrees(x)


@pytest.mark.parametrize("shared", [1, 2, 10])
def test_level_weights_of_several_heads(shared):
    """Narrow weights are read narrow; heads of one block may have one entry or several."""
    x = operands(40, "rate", False, 6, batch=2, groups=1, heads=40)
    assert_agrees({**x, "level_weights": x["level_weights"][:, :, : 40 // shared]})
    assert_agrees({**x, "level_weights": x["level_weights"][:, :, :1]})


def test_a_decay_per_head():
    """A log decay `[H]`: its gradient is summed over all tokens."""
    x = operands(40, "rate", False, 6)
    assert_agrees({**x, "log_decay": -torch.rand(4, dtype=torch.float64)})


def test_memory_as_a_model_has_it():
    """Values and steps in memory of `[B, H, T]`, as a short convolution leaves them; every other token."""
    x = operands(100, "rate", False, 8)
    odd = {n: t.transpose(1, 2).contiguous().transpose(1, 2) for n, t in x.items() if n in ("v", "log_decay", "q")}
    odd["k"] = torch.stack([x["k"], x["k"]], 2).flatten(1, 2)[:, ::2]
    odd["decay_rate"] = x["decay_rate"].T.contiguous().T
    assert not any(t.is_contiguous() for t in odd.values())
    assert_agrees({**x, **odd})


def test_packed_and_padded():
    """Levels restart in each sequence; one is empty. Rates have one gradient from all."""
    x = operands(150, "rate", False, 9, batch=1)
    x["initial_state"] = operands(1, batch=4, state="linear")["initial_state"]
    assert_agrees(x, cu_seqlens=torch.tensor([0, 3, 3, 70, 150]))
    y = operands(90, "rate", False, 9, "level", batch=3)
    mask = torch.zeros(3, 90)
    mask[0, 20:], mask[1, :70] = 1, 1
    assert_agrees(y, attention_mask=mask)


@pytest.mark.parametrize("levels", [None, 9])
@pytest.mark.parametrize("kept", [0, 2, 7])
def test_states_that_do_not_fit_are_computed_again(monkeypatch, levels, kept):
    """Few checkpoints, in stretches inside of stretches: the same gradients, bit by bit."""
    x = operands(300, "rate", False, levels, "linear", batch=1)
    whole = _gradients(x)
    block = 2 * 64 * 5 * 3 * (levels or 1)  # bytes of the states of a block with vectors of 64 bytes
    monkeypatch.setattr(engine, "KEPT", 2 * kept * block)
    assert all(torch.equal(a, b) for a, b in zip(whole, _gradients(x), strict=True))


def test_threads_share_the_heads_of_a_sequence(threads):
    """Each sums gradients of what heads share by itself; with one number of threads, the same bits every time."""
    x = operands(40, "rate", False, 6, batch=1, groups=1, heads=40)
    x["level_weights"] = x["level_weights"][:, :, :2]
    for count in (2, 3, 8):
        threads(count)
        assert_agrees(x)
        assert all(torch.equal(a, b) for a, b in zip(_gradients(x), _gradients(x), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_operands_of_other_dtypes(dtype):
    """Steps and rates of a model in half precision are float32."""
    x = operands(100, "rate", False, 8, dtype=torch.float32)
    mixed = {n: x[n].to(dtype) for n in ("q", "k", "v")}
    for name, (ours, definition) in both({**x, **mixed}).items():
        budget = 200 * torch.finfo(torch.float32).eps + 2 * torch.finfo(dtype).eps  # the output's gradient is rounded
        assert relative_error(ours, definition) <= budget, name


def test_what_is_not_finite_stays_with_its_head_and_the_tokens_after_it():
    x = operands(50, "rate", False, 7, batch=1)
    whole = loglinear_attention(**x)[0]
    x["v"][0, 20, 1] = torch.nan
    o = loglinear_attention(**x)[0]
    assert torch.equal(o[:, :20], whole[:, :20])
    assert torch.equal(o[:, :, [0, 2, 3]], whole[:, :, [0, 2, 3]])
    assert o[:, 20:, 1].isnan().all()


@pytest.mark.parametrize("delta", [True, "erase"])
def test_rates_with_a_correction_are_refused(delta):
    """ATen runs them; asked for by name, the reason names both."""
    with pytest.raises(KernelError, match=r"no kernels for decay 'rate' with correction '(delta|erase)'"):
        loglinear_attention(**operands(3, "rate", delta))


# Prints by how much the peak grows in a forward and backward pass, and how large decays per channel would be.
MEASURED = """
import resource, torch
from llcompile.kernels import choice
from llcompile.ops import loglinear_attention
T, H, K = 2048, 256, 64
def call(length):
    make = lambda *shape: torch.rand(1, length, *shape).requires_grad_()
    rate = torch.rand(H, K).requires_grad_()
    decay = (-torch.rand(1, length, H)).requires_grad_()
    with choice.use("cpp"):
        o, _ = loglinear_attention(make(1, K), make(1, K), make(H, 1), make(1, 12), decay, decay_rate=rate)
    o.sum().backward()
call(20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
call(T)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024, T * H * K * 4)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
def test_nothing_is_as_large_as_decays_per_channel():
    """Less than a quarter of `[T, H, K]`, forward and backward, with all that the operator takes and gives."""
    done = subprocess.run([sys.executable, "-c", MEASURED], capture_output=True, text=True, check=True)
    grown, per_channel = map(int, done.stdout.split())
    assert grown < per_channel / 4
