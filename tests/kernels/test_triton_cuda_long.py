"""On a GPU: what long calls and decoding run besides the kernels of test_triton_cuda.py.

Blocks of chunks, segments, decays on both sides of the limit for products, steps in place, and replayed states.
"""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from torch import Tensor

from llcompile.kernels import choice
from llcompile.kernels.operands import Operands
from llcompile.ops import ReplayState, loglinear_attention_step, loglinear_attention_step_
from tests.kernels.kernel_cases import relative_error

pytest.importorskip("triton")

from llcompile.kernels.triton import blocks, engine, segments
from tests.kernels import cuda_cases
from tests.kernels.cuda_cases import SCALE, Results, compare, lowering, named, on_gpu

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]

BF16 = torch.bfloat16
SIZES = [(64, 64), (128, 64), (128, 128), (80, 96)]
FAMILIES = [
    ("token", False),
    ("token", True),
    ("channel", True),
    ("rate", False),
    ("channel", "erase"),
]


def by_blocks(x: Operands, grad: Tensor) -> Results:
    return {"o": blocks.forward(x, SCALE)}


def by_segments(x: Operands, grad: Tensor, tokens: int) -> Results:
    o, _ = segments.forward_by(x, SCALE, False, tokens)
    return {"o": o, **named(segments.backward_by(x, SCALE, grad, None, tokens))}


def output(x: Operands, grad: Tensor) -> Results:
    return {"o": lowering(x, grad)["o"]}


@pytest.mark.parametrize(("key_dim", "value_dim"), SIZES)
@pytest.mark.parametrize(("decay", "delta"), list(itertools.product((None, "token"), (False, True))))
def test_blocks(decay, delta, key_dim, value_dim):
    """Four blocks of 16 chunks and a part of one, heads that share queries."""
    sizes = {"groups": 2, "heads": 4, "key_dim": key_dim, "value_dim": value_dim}
    x = on_gpu(BF16, length=4 * 1024 + 333, decay=decay, delta=delta, levels=14, **sizes)
    compare(x, output, by_blocks)


@pytest.mark.parametrize("delta", [False, True])
def test_blocks_of_long_calls(delta, monkeypatch):
    """A call that goes in blocks by itself: as near to float64 as the kernels for short calls."""
    sizes = {"groups": 16, "heads": 16, "key_dim": 128, "value_dim": 128}
    x = on_gpu(BF16, length=16 * 1024, decay="token", delta=delta, levels=15, **sizes)
    assert blocks.serves(engine.Description.of(engine.describe(x, False)), *x.v.shape[:3])
    found, _ = engine.forward(x, SCALE, False)
    monkeypatch.setattr(blocks, "serves", lambda *_: False)
    short, _ = engine.forward(x, SCALE, False)
    want = output(x, x.v)["o"]
    assert relative_error(found, want) <= max(1.5 * relative_error(short, want), torch.finfo(BF16).eps)


@pytest.mark.parametrize("levels", [None, 13])
@pytest.mark.parametrize(("decay", "delta"), FAMILIES, ids=str)
def test_segments(decay, delta, levels):
    """Three segments, the last one of a few tokens, forward and backward."""
    sizes = {"key_dim": 16, "value_dim": 1, "heads": 64} if decay == "rate" else {"key_dim": 64, "value_dim": 64}
    x = on_gpu(BF16, length=2 * 1024 + 37, decay=decay, delta=delta, levels=levels, **sizes)
    compare(x, lowering, functools.partial(by_segments, tokens=1024))


def test_segments_of_one_decay():
    """A decay per head, whose gradient is a sum over all tokens in which much cancels: as that of the whole call."""
    x = on_gpu(BF16, length=2 * 1024 + 37, decay="head", levels=13, key_dim=64, value_dim=64)
    compare(x, cuda_cases.kernels, functools.partial(by_segments, tokens=1024))


@pytest.mark.parametrize("strength", [0.05, 1.0, 100.0])
@pytest.mark.parametrize("delta", [False, True])
def test_decays_of_any_strength(delta, strength):
    """Scores by products, by pairs and of both kinds in one call, a channel that is forgotten at once."""
    x = on_gpu(BF16, length=700, decay="channel", delta=delta, levels=11, key_dim=128, value_dim=64)
    assert x.log_decay is not None
    decay = x.log_decay * strength
    decay[:, 100:300, :, 3] = -20.0
    compare(x._replace(log_decay=decay), lowering)


@pytest.mark.parametrize("levels", [None, 9])
@pytest.mark.parametrize(("decay", "delta"), FAMILIES, ids=str)
def test_steps_in_place(decay, delta, levels):
    """Token by token: output and state as those of steps that return a new state."""
    sizes = {"key_dim": 16, "value_dim": 1} if decay == "rate" else {"key_dim": 128, "value_dim": 64}
    kind = "linear" if levels is None else "level"
    x = on_gpu(BF16, length=24, decay=decay, delta=delta, levels=levels, state=kind, batch=3, heads=4, **sizes)
    held, state = x.initial_state.clone(), x.initial_state
    with choice.use("triton"):
        for token in tokens_of(x):
            mine = loglinear_attention_step_(**token, state=held, scale=SCALE)
            want, state = loglinear_attention_step(**token, state=state, scale=SCALE)
            assert relative_error(mine, want) <= torch.finfo(BF16).eps
            assert relative_error(held, state) <= 1e-6


@pytest.mark.parametrize(("decay", "delta"), FAMILIES, ids=str)
def test_replayed_states(decay, delta):
    """Drafts of several tokens, half of them taken back, against single steps."""
    sizes = {"key_dim": 16, "value_dim": 1} if decay == "rate" else {"key_dim": 128, "value_dim": 64}
    x = on_gpu(BF16, length=36, decay=decay, delta=delta, levels=9, state="level", batch=3, heads=4, **sizes)
    replayed, state = ReplayState(x.initial_state, 6, 8), x.initial_state
    tokens = tokens_of(x)
    with choice.use("triton"):
        for first in range(0, 30, 3):
            some = {n: None if t is None else draft(t, first) for n, t in operands_of(x).items()}
            o = replayed.step(**some, scale=SCALE)
            replayed.rollback(3)
            for t in range(3):
                want, state = loglinear_attention_step(**tokens[first + t], state=state, scale=SCALE)
                assert relative_error(o[:, t], want) <= 4 * torch.finfo(BF16).eps
    assert relative_error(replayed.state(), state) <= 1e-3


def operands_of(x: Operands) -> dict[str, Tensor | None]:
    return {n: getattr(x, n) for n in cuda_cases.NAMES if n != "initial_state"}


def draft(t: Tensor, first: int) -> Tensor:
    return t if t.dim() < 3 else t[:, first : first + 6]


def tokens_of(x: Operands) -> list[dict[str, Tensor | None]]:
    rows = operands_of(x)
    return [{n: t if t is None or t.dim() < 3 else t[:, i] for n, t in rows.items()} for i in range(x.v.shape[1])]
