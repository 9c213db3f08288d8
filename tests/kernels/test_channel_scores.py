"""Scores with decays per channel: products of matrices where a block's span allows, pair by pair elsewhere.

Both ways at the border, forward and backward, against the float64 definition, in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from llcompile.kernels.triton.cost import worker as counter
from llcompile.kernels.triton.cost.case import Case
from tests.kernels import channel_cases
from tests.kernels.channel_cases import ABOVE, AT, BELOW
from tests.kernels.interpreting import interpreter

FAR = 500.0
TILE = 16  # K = 5
# FLOPs of one product [block, block, K].
PRODUCT = 2 * 16 * 16 * TILE


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessPoolExecutor]:
    """A process where the interpreter is on from the start."""
    with interpreter(tmp_path_factory.mktemp("kernels")) as pool:
        yield pool


def run(
    worker: ProcessPoolExecutor, spans: list[float], bounds: list[int], size: float = 1.0, **case: Any
) -> dict[str, int]:
    """Check errors against the budget; how many products of fp32 tiles there were in each kernel."""
    case = {"decay": "channel", "levels": 9, "batch": 1, "groups": 1, "heads": 1, "dtype": torch.bfloat16, **case}
    found = worker.submit(channel_cases.border, case, spans, bounds, size).result()
    for name, error in found["errors"].items():
        assert error <= found["budget"], f"{name}: {error:.2e} > {found['budget']:.2e}"
    assert {"o", "q", "k", "v", "log_decay"} <= found["errors"].keys()
    return {kernel: flops // PRODUCT for kernel, flops in found["products"].items()}


def expected(blocks: int, delta: bool) -> dict[str, int]:
    """Products of `blocks` blocks: of queries and, for the delta rule, of keys; backward two for each."""
    kinds = 1 + delta
    return {"chunk_scores": blocks * kinds, "chunk_scores_gradient": 2 * blocks * kinds}


@pytest.mark.parametrize("delta", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_border(worker, delta):
    """Blocks below the limit and at it go by products, those above it and far beyond do not; an odd length."""
    got = run(worker, [AT, ABOVE, BELOW, FAR], [0, 75], delta=delta)
    # Of the chunk that is not whole: a block of 11 tokens at the limit, and 3 without tokens.
    wanted = expected(2 + 1 + 3, delta)
    # chunk_scores runs forward, and backward again.
    assert got == {**wanted, "chunk_scores": 2 * wanted["chunk_scores"]}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("span", [BELOW, AT, ABOVE])
def test_one_span(worker, span, delta, dtype):
    """All blocks at one side of the border, in each dtype, for sizes that fill no tile."""
    run(worker, [span], [0, 83], delta=delta, dtype=dtype, key_dim=33, value_dim=17)


@pytest.mark.parametrize("delta", [pytest.param(False, marks=pytest.mark.slow), True])
def test_packed(worker, delta):
    """Sequences that begin anywhere: blocks, and their spans, count from each one's begin."""
    got = run(worker, [AT, ABOVE], [0, 3, 35], delta=delta)
    wanted = expected(1 + 3 + 1 + 2, delta)  # 3 tokens and 3 empty blocks; one of two blocks, and 2 empty ones
    assert got == {**wanted, "chunk_scores": 2 * wanted["chunk_scores"]}


def test_large_operands(worker):
    """Queries as large as products may take, and beyond, where factors could leave the range of fp32."""
    _, largest = channel_cases.limits()
    below = run(worker, [AT], [0, 16], size=largest, dtype=torch.float32)
    above = run(worker, [AT], [0, 16], size=2 * largest, dtype=torch.float32)
    # Gradients of queries are what they were; products of fp32 stand between empty blocks in both.
    assert below["chunk_scores"] == above["chunk_scores"] + 2


@pytest.mark.parametrize("operation", ["forward", pytest.param("backward", marks=pytest.mark.slow)])
def test_arithmetic_moves_to_tensor_cores(operation):
    """One chunk, K = 128: elementwise operations are those of rows, not of pairs times channels."""
    case = Case("channel/delta", operation, heads=1, groups=1, length=64, levels=7)
    name = {"forward": "chunk_scores", "backward": "chunk_scores_gradient"}[operation]
    (launches,) = counter.counts([case])
    numbers = next(one.numbers for one in launches if one.kernel == name)
    blocks, pairs = 4, 16 * 16 * 128
    products = {"forward": 2, "backward": 4}[operation] * blocks
    assert numbers["dot tf32"] == products * 2 * pairs
    # Pair by pair there are 8 (backward 17) operations for each pair and channel of a block.
    assert numbers["pointwise"] < {"forward": 4, "backward": 8}[operation] * blocks * pairs
