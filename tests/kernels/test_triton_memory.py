"""Buffers that do not fit are said before anything runs; no GPU is needed to count them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from llcompile.errors import KernelMemoryError
from llcompile.kernels import choice
from llcompile.kernels.implementations import ATEN, IMPLEMENTATIONS, Triton
from llcompile.kernels.operands import Operands
from llcompile.kernels.triton import autotune, engine, memory
from tests.kernels.kernel_cases import operands
from tests.kernels.launches import recorded


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Generated files stay in the test's folder."""
    monkeypatch.setenv("LLCOMPILE_KERNEL_DIR", str(tmp_path / "kernels"))


def given(decay="token", **case):
    return Operands(*operands(200, decay, dtype=torch.float32, levels=6, **case).values(), None)


@pytest.mark.parametrize("decay", ["token", "channel", "rate"])
@pytest.mark.parametrize("sweep", ["forward", "backward"])
def test_all_that_is_allocated_is_counted(monkeypatch, decay, sweep):
    """The bytes that are counted before the first launch are those that the launches' buffers have."""
    counted = []
    plain = memory.workspace
    monkeypatch.setattr(
        memory, "workspace", lambda a, k, n: counted.append((plain(a, k, n), a, set(a))) or counted[-1][0]
    )
    x = given(decay)
    run = {"forward": lambda: engine.forward(x, 1.0, False), "backward": lambda: engine.backward(x, 1.0, x.v, None)}
    recorded(run[sweep])
    ((wanted, arguments, before),) = counted
    new = [t for name, t in arguments.items() if name not in before and isinstance(t, torch.Tensor)]
    made = {id(t): t for t in new}.values()  # one may stand for others that are empty
    assert wanted == sum(t.numel() * t.element_size() for t in made) > 0


@pytest.mark.parametrize("decay", ["token", "rate"])
def test_what_does_not_fit(monkeypatch, decay):
    """An error with the shapes, before the first launch; what fits runs."""
    x = given(decay)
    monkeypatch.setattr(memory, "SMALL", 0)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    launched = []
    monkeypatch.setattr(autotune, "run_all", launched.extend)
    with pytest.raises(KernelMemoryError, match=r"values \[2, 200, 4, 3\].* GB are free on cpu; .*fewer rows"):
        engine.forward(x, 1.0, False)
    assert not launched
    for free in (1 << 40, None):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        engine.forward(x, 1.0, False)
    assert launched
    monkeypatch.setattr(memory, "SMALL", 1 << 30)
    monkeypatch.setattr(memory, "free_bytes", lambda device: pytest.fail("a small call asks nobody"))
    engine.forward(x, 1.0, False)


def test_what_runs_instead(monkeypatch, caplog):
    """ATen, unless kernels were asked for by name; the next call tries again."""

    class Full(Triton):
        calls = 0

        def reason(self, d, device):
            return None

        def rejection(self, d, device, sweep):
            return None

        def forward(self, x, scale, final):
            Full.calls += 1
            raise KernelMemoryError("the buffers take 9.0 GB, and 1.0 GB are free on cuda:0")

    one = Full()
    monkeypatch.setitem(IMPLEMENTATIONS, "triton", one)
    monkeypatch.setattr(choice, "preferred", lambda device: one)
    monkeypatch.delenv(choice.VARIABLE, raising=False)
    choice._tell.cache_clear()
    x = given()
    want = ATEN.forward(x, 1.0, False)[0]
    for _ in range(2):
        assert torch.equal(choice.forward(x, 1.0, False)[0], want)
    assert caplog.text.count("9.0 GB") == 1
    with choice.use("triton"), pytest.raises(KernelMemoryError, match=r"LLCOMPILE_KERNELS=triton.*9.0 GB"):
        choice.forward(x, 1.0, False)
    assert Full.calls == 3


def test_free_memory(monkeypatch):
    """What the driver has free, and what torch holds without using it."""
    assert memory.free_bytes(torch.device("cpu")) is None
    stand_in = SimpleNamespace(
        is_current_stream_capturing=lambda: False,
        mem_get_info=lambda device: (10, 100),
        memory_reserved=lambda device: 7,
        memory_allocated=lambda device: 3,
    )
    monkeypatch.setattr(torch, "cuda", stand_in)
    assert memory.free_bytes(torch.device("cuda:0")) == 14
