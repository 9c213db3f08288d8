"""Triton kernels on a GPU: small and odd sizes against the definition, large ones against the ATen lowering, float64.

The definition is a loop over tokens, too slow for thousands of them; the ATen lowering in float64 agrees with it to
1e-10 (test_operator.py). Ordered so that a run that is cut short has seen the plainest cases.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from benchmarks.cuda.cases import LEVELS
from llcompile.kernels.aten import sequence as aten
from llcompile.kernels.operands import Operands, Token
from tests.kernels.kernel_cases import relative_error

pytest.importorskip("triton")

from llcompile.kernels.triton import engine
from llcompile.kernels.triton.step import step
from tests.kernels.cuda_cases import SCALE, compare, definition, doubled, lowering, on_gpu

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]

CELLS = list(itertools.product((None, "token", "channel"), (False, True)))


@pytest.mark.parametrize("levels", [None, 9])
@pytest.mark.parametrize(("decay", "delta"), CELLS)
def test_small(decay, delta, levels):
    """Four chunks, the last one partial, sizes that are no powers of two."""
    x = on_gpu(torch.float32, length=200, decay=decay, delta=delta, levels=levels, key_dim=33, value_dim=17)
    compare(x, definition)


@pytest.mark.parametrize("levels", [None, LEVELS])
@pytest.mark.parametrize(("decay", "delta"), CELLS)
def test_large(decay, delta, levels):
    """128 chunks, in numbers for which Triton makes the very kernels that the benchmark then times."""
    sizes = {"groups": 16, "heads": 16, "key_dim": 128, "value_dim": 128}
    compare(on_gpu(torch.bfloat16, length=8192, decay=decay, delta=delta, levels=levels, **sizes), lowering)


@pytest.mark.parametrize("length", [1, 63, 65, 127, 4097])
def test_odd_lengths(length):
    """Around chunks, with shared queries and rows of a batch."""
    x = on_gpu(torch.bfloat16, length=length, delta=True, levels=14, batch=2, groups=2, heads=4, key_dim=64)
    compare(x, lowering)


@pytest.mark.parametrize(("key_dim", "value_dim"), [(64, 64), (64, 128), (128, 128), (80, 96), (128, 64), (40, 130)])
@pytest.mark.parametrize("delta", [False, True])
def test_sizes(key_dim, value_dim, delta):
    x = on_gpu(torch.bfloat16, length=1000, delta=delta, levels=11, key_dim=key_dim, value_dim=value_dim)
    compare(x, lowering)


def test_far_positions():
    """Offsets beyond 2**31 elements: 256k tokens of 32 heads, the last of them against a slice of their own."""
    shape, head = (1, 2**18, 32, 128), slice(31, 32)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 0.1 for _ in range(3))
    w = torch.rand(*shape[:3], 19, device="cuda", dtype=torch.bfloat16)
    g = -0.1 * torch.rand(shape[:3], device="cuda")
    whole = engine.forward(Operands(q, k, v, w, g), 1.0, False)[0][:, :, head]
    parts = (t[:, :, head] for t in (q, k, v, w, g))
    q1, k1, v1, w1, g1 = parts
    assert torch.equal(whole, engine.forward(Operands(q1, k1, v1, w1, g1), 1.0, False)[0])


@pytest.mark.parametrize(
    ("dtype", "key_dim", "value_dim"),
    [
        *((torch.bfloat16, k, v) for k, v in ((16, 16), (64, 3), (32, 48), (128, 16), (128, 64))),
        *((torch.float32, k, v) for k, v in ((16, 16), (5, 3))),
    ],
)
@pytest.mark.parametrize(("decay", "delta"), CELLS)
def test_narrow(decay, delta, dtype, key_dim, value_dim):
    """Tiles with short rows, which Hopper's matrix instructions get wrong by Triton 3.6.0 (docs/kernels.md)."""
    sizes = {"batch": 2, "groups": 2, "heads": 4, "key_dim": key_dim, "value_dim": value_dim}
    compare(on_gpu(dtype, length=150, decay=decay, delta=delta, levels=14, **sizes), lowering)


@pytest.mark.parametrize("key_dim", [16, 64, 128])
@pytest.mark.parametrize("decay", [None, "token", "channel"])
def test_scans(decay, key_dim):
    """The linear operator with the delta rule, whose scans have tiles of their own (tuning.narrowest)."""
    compare(
        on_gpu(torch.bfloat16, length=700, decay=decay, delta=True, levels=None, key_dim=key_dim, value_dim=64),
        lowering,
    )


@pytest.mark.parametrize("levels", [None, 1, 9])
def test_small_rates(levels):
    """Decays by rates at sizes that are no powers of two, heads that share queries and weights."""
    sizes = {"groups": 2, "heads": 12, "key_dim": 33, "value_dim": 5, "shared": 3}
    compare(on_gpu(torch.float32, length=100, decay="rate", levels=levels, **sizes), definition)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("levels", [None, 13, 17])
def test_rates_of_mamba(levels, dtype):
    """Channels of a Mamba-1 layer: one value each, 16 numbers of a state."""
    sizes = {"batch": 2, "heads": 512, "key_dim": 16, "value_dim": 1, "shared": 512}
    compare(on_gpu(dtype, length=1000, decay="rate", levels=levels, **sizes), lowering)


@pytest.mark.parametrize(("levels", "state"), [(None, "linear"), (5, "linear"), (9, "level")])
def test_rates_with_states(levels, state):
    """Gradients of the initial state; a state that is at a position of its own."""
    sizes = {"batch": 3, "heads": 40, "key_dim": 16, "value_dim": 1, "shared": 8}
    compare(on_gpu(torch.float32, length=150, decay="rate", levels=levels, state=state, **sizes), definition)


@pytest.mark.parametrize("levels", [None, 7])
def test_steps_of_rates(levels):
    """Token by token what a whole pass gives, and the state after it."""
    sizes = {"batch": 2, "heads": 48, "key_dim": 16, "value_dim": 1, "shared": 48}
    x = on_gpu(torch.float32, length=40, decay="rate", levels=levels, **sizes)
    whole, final = engine.forward(x, SCALE, True)
    want, want_state = aten.forward(doubled(x), SCALE, True)
    state = torch.zeros_like(final)
    outputs = []
    for t in range(40):
        w = None if x.level_weights is None else x.level_weights[:, t]
        token = Token(x.q[:, t], x.k[:, t], x.v[:, t], w, state, x.log_decay[:, t], x.decay_rate, scale=SCALE)
        o, state = step(token)
        outputs.append(o[:, None])
    for found in (whole, torch.cat(outputs, 1)):
        assert relative_error(found, want) < 1e-5
    for found in (final, state):
        assert relative_error(found, want_state) < 1e-5


@pytest.mark.parametrize("levels", [None, 9])
@pytest.mark.parametrize("decay", [None, "token", "channel"])
def test_small_erase_keys(decay, levels):
    """An erase key of its own, heads that share it, sizes that are no powers of two."""
    sizes = {"groups": 1, "heads": 2, "key_dim": 33, "value_dim": 17}
    compare(on_gpu(torch.float32, length=200, decay=decay, delta="erase", levels=levels, **sizes), definition)


@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 64), (torch.bfloat16, 128), (torch.float16, 64)])
@pytest.mark.parametrize("levels", [None, 12])
def test_erase_keys(levels, dtype, size):
    """Many chunks, as RWKV-7 has them."""
    sizes = {"batch": 2, "groups": 4, "heads": 4, "key_dim": size, "value_dim": size}
    compare(on_gpu(dtype, length=1100, decay="channel", delta="erase", levels=levels, **sizes), lowering)


@pytest.mark.parametrize(("levels", "state"), [(None, "linear"), (5, "linear"), (9, "level")])
def test_erase_keys_with_states(levels, state):
    """Gradients of the initial state; a state that is at a position of its own."""
    sizes = {"batch": 3, "key_dim": 64, "value_dim": 64}
    compare(
        on_gpu(torch.float32, length=150, decay="channel", delta="erase", levels=levels, state=state, **sizes),
        definition,
    )
