"""Cutting a call by heads and rows changes nothing."""

from __future__ import annotations

import pytest

from llcompile.kernels.aten import slabs
from tests.kernels.kernel_cases import assert_agrees, operands


@pytest.mark.parametrize("size", [1, 110, 250])
@pytest.mark.parametrize("decay", ["head", "token", "channel"])
def test_slabs(monkeypatch, size, decay):
    """One group, one row, several rows at a time."""
    monkeypatch.setattr(slabs, "_SLAB", size)
    x = operands(10, decay, delta=decay == "channel", state="level", batch=4)
    assert len(slabs.slabs(slabs.Operands(*x.values(), None))) > 1
    assert_agrees(x)
    assert_agrees({**x, "level_weights": None})
