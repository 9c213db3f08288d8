"""Fixtures of the kernels' tests."""

from __future__ import annotations

import pytest
import torch

from llcompile.kernels import cache, choice
from llcompile.kernels.implementations import IMPLEMENTATIONS


@pytest.fixture
def threads():
    """A function that sets the number of threads, for this test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def fresh_kernels(monkeypatch, tmp_path):
    """A process that has tested, refused and told nothing, with an empty folder."""
    monkeypatch.setenv(cache.FOLDER_VARIABLE, str(tmp_path / "kernels"))
    monkeypatch.delenv(choice.VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    acceptance = pytest.importorskip("llcompile.kernels.triton.acceptance")
    monkeypatch.setattr(acceptance, "_known", {})
    monkeypatch.setattr(choice, "_refused", {})
    choice._tell.cache_clear()


@pytest.fixture
def install(monkeypatch, fresh_kernels):
    """A function that puts a stand-in where `auto` and `triton` find it, on a CPU."""

    def put(one):
        monkeypatch.setitem(IMPLEMENTATIONS, "triton", one)
        monkeypatch.setattr(choice, "preferred", lambda device: one)
        return one

    return put
