"""Triton kernels against the definition, in Triton's interpreter: every family, odd shapes, poisoned operands."""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

pytest.importorskip("triton")

import triton_cases

CELLS = list(itertools.product((None, "token", "channel"), (False, True)))
Check = Callable[..., None]


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessPoolExecutor]:
    """A process where the interpreter is on from the start."""
    settings = {"TRITON_INTERPRET": "1", "LLCOMPILE_KERNEL_DIR": str(tmp_path_factory.mktemp("kernels"))}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        pool.submit(triton_cases.settled).result()  # the process has started: it has the settings
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
        yield pool


@pytest.fixture
def check(worker: ProcessPoolExecutor) -> Check:
    """Compare a case with the definition."""

    def run(final: bool = False, lengths: list[int] | None = None, poisoned: bool = False, **case: object) -> None:
        case = {"dtype": torch.float32, "batch": 1, "groups": 1, "heads": 1, **case}
        found = worker.submit(triton_cases.errors, case, final, lengths, poisoned).result()
        assert {"o", "q", "k", "v"} <= found.keys()
        for name, (error, budget) in found.items():
            assert error <= budget, f"{name}: {error:.2e} > {budget:.2e}"

    return run


@pytest.mark.parametrize("levels", [None, 9])
@pytest.mark.parametrize(("decay", "delta"), CELLS)
def test_definition(check, decay, delta, levels):
    """Output and gradients of every family on four chunks, the last one partial, in poisoned buffers."""
    check(length=200, decay=decay, delta=delta, levels=levels, poisoned=True)


@pytest.mark.parametrize(("decay", "delta"), CELLS)
def test_groups_and_short_rows(check, decay, delta):
    """Heads that share queries, several rows, one chunk, fewer levels than needed."""
    check(length=67, decay=decay, delta=delta, levels=3, batch=2, groups=2, heads=4, poisoned=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("decay", "delta"), CELLS[:4])
def test_half_precision(check, decay, delta, dtype):
    """Half precision loses what its roundings lose."""
    check(length=130, decay=decay, delta=delta, levels=9, dtype=dtype, key_dim=16, value_dim=17)


def test_decay_per_head(check):
    """A fixed decay per head: its gradient sums over rows and tokens."""
    check(length=70, decay="head", batch=2, heads=2)


def test_same_bits(worker):
    """Two backward passes are bitwise the same."""
    case = {"length": 140, "delta": True, "dtype": torch.float32, "heads": 2, "groups": 1}
    assert worker.submit(triton_cases.same_bits, case).result()


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 63, 64, 65, 128, 333, 520])
@pytest.mark.parametrize(("decay", "delta"), CELLS)
@pytest.mark.parametrize("levels", [None, 11])
def test_grid_of_lengths(check, length, decay, delta, levels):
    """All lengths around chunks and blocks of them."""
    check(length=length, decay=decay, delta=delta, levels=levels, poisoned=True)


@pytest.mark.slow
@pytest.mark.parametrize(("key_dim", "value_dim"), list(itertools.product((1, 16, 33, 128), repeat=2)))
@pytest.mark.parametrize(("decay", "delta"), CELLS)
def test_grid_of_sizes(check, key_dim, value_dim, decay, delta):
    """All head sizes, whatever their remainder."""
    check(length=130, decay=decay, delta=delta, levels=9, key_dim=key_dim, value_dim=value_dim, poisoned=True)
