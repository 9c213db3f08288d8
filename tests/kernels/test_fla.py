"""Our Triton kernels against FLA's own, both in Triton's interpreter: an independent author's definition.

FLA is no dependency: these tests run where its wheel is installed (`pip install flash-linear-attention`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.fla_calls import TWINS
from tests.kernels import fla_cases
from tests.kernels.interpreting import interpreter

without_fla = pytest.mark.skipif(importlib.util.find_spec("fla") is None, reason="FLA is not installed")


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessPoolExecutor]:
    """A process where the interpreter is on from the start."""
    with interpreter(tmp_path_factory.mktemp("kernels")) as pool:
        yield pool


@pytest.mark.slow
@without_fla
@pytest.mark.parametrize("tokens", [128, 130])
@pytest.mark.parametrize("name", TWINS)
def test_outputs_and_gradients(worker, name, tokens):
    """Whole chunks, and a last one of two tokens: equal to what fp32 loses."""
    found = worker.submit(fla_cases.errors, name, tokens).result()
    assert {"o", "q", "k", "v", "g"} <= found.keys()
    assert max(found.values()) < 5e-6, found


@pytest.mark.slow
@without_fla
@pytest.mark.parametrize(("name", "change"), [("log-linear", "level_scales"), ("gated delta", "beta")])
def test_another_operand_is_seen(worker, name, change):
    """The comparison tells kernels apart that get other level weights, or write other amounts."""
    assert worker.submit(fla_cases.errors, name, 128, change).result()["o"] > 1e-3


@pytest.mark.parametrize("name", TWINS)
def test_twins_take_one_call(name):
    """The same operands go through our operator, with gradients, without FLA."""
    twin = TWINS[name]
    leaves = twin.leaves(70, 2, 8, 4, torch.float32, 8)
    o = twin.ours()(**leaves)
    assert o.shape == (1, 70, 2, 4)
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(o.square().sum(), list(leaves.values())))
