"""Per-level readouts on Triton kernels: in the interpreter, compiled for chips that are not there, and on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

pytest.importorskip("triton")

from llcompile.kernels.description import ReadoutDescription
from llcompile.kernels.triton.check import compile_readouts
from llcompile.kernels.triton.chips import CHIPS
from llcompile.kernels.triton.readout_source import KERNELS
from tests.kernels import readout_cases
from tests.kernels.interpreting import interpreter

LEFT, RIGHT, NONE = [0] * 6 + [1] * 34, [1] * 33 + [0] * 7, [0] * 40


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessPoolExecutor]:
    """A process where the interpreter is on from the start."""
    with interpreter(tmp_path_factory.mktemp("kernels")) as pool:
        yield pool


@pytest.mark.parametrize(
    ("length", "levels", "positions", "final"),
    [(5, 4, (), False), (100, 9, (), False), (130, 3, (), True), (40, 1, (), False), (70, 9, (13, 64), True)],
)
def test_definition(worker, length, levels, positions, final):
    """Inside a chunk and across chunks, fewer levels than needed, and rows that continue inside a chunk."""
    found = worker.submit(readout_cases.errors, length, levels, *positions, final=final).result()
    assert {"readouts", "query", "key"} <= found.keys()
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("positions", [(), (3, 8, 5)])
def test_padded(worker, positions):
    mask = torch.tensor([LEFT, RIGHT, NONE])
    found = worker.submit(readout_cases.errors, 40, 5, *positions, batch=3, attention_mask=mask).result()
    assert max(found.values()) < 1e-5, found


def test_packed(worker):
    bounds = torch.tensor([0, 3, 3, 44, 80])
    found = worker.submit(readout_cases.errors, 80, 6, batch=1, cu_seqlens=bounds).result()
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("levels", [1, 5])
def test_step(worker, levels):
    assert worker.submit(readout_cases.step_error, levels, 13, 63, 0, 8).result() < 1e-5


@pytest.mark.parametrize(("heads", "key_dim", "value_dim"), [(2, 8, 4), (4, 5, 4)])
def test_step_of_a_mixer(worker, heads, key_dim, value_dim):
    """The sums of a set in the header of one head, and of two; no launch reads or writes them by itself."""
    assert worker.submit(readout_cases.mixer_step_error, heads, key_dim, value_dim).result() < 1e-5


@pytest.mark.parametrize(
    ("length", "positions", "packed"),
    [
        (1100, (), False),
        pytest.param(2100, (), False, marks=pytest.mark.slow),
        pytest.param(1030, (1500,), False, marks=pytest.mark.slow),
        pytest.param(2200, (), True, marks=pytest.mark.slow),
    ],
)
def test_many_chunks(worker, length, positions, packed):
    """More than the nodes of one program: a node of all chunks before it, and of those of two programs."""
    found = worker.submit(readout_cases.long_errors, length, *positions, packed=packed).result()
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("chip", ["sm_90", pytest.param("sm_80", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)])
@pytest.mark.parametrize("rows", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_compiled(chip, dtype, rows, tmp_path, monkeypatch):
    """Every kernel fits and spills nothing."""
    monkeypatch.setenv("LLCOMPILE_KERNEL_DIR", str(tmp_path))
    found = compile_readouts(ReadoutDescription(16, 16, dtype), CHIPS[chip], rows)
    for name, (registers, spilled, shared) in found.items():
        print(chip, name, registers, spilled, shared)
        assert spilled == 0, name
        assert shared <= CHIPS[chip].shared, name
    assert found.keys() == set(KERNELS)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("length", [5, 100, 1000])
@pytest.mark.parametrize("positions", [(), (13, 64)])
def test_on_gpu(length, positions):
    state = readout_cases.old_state(12, *positions).float().cuda() if positions else None
    query, key = (x.float().cuda() for x in readout_cases.operands(length))
    for name, (ours, definition) in readout_cases.both(query, key, 12, state).items():
        error = (ours.double() - definition).abs().max() / definition.abs().max()
        assert error < 1e-4, name
