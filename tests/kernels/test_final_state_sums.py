"""Levels that meet in a final state are summed in a fixed order, on a GPU, too."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llcompile.kernels import layout
from llcompile.kernels.aten import sequence
from llcompile.kernels.operands import Operands
from tests.kernels.kernel_cases import operands

# What adds by atomics on a GPU (torch.use_deterministic_algorithms lists them).
ATOMIC = {"index_add", "index_add_", "scatter_add", "scatter_add_", "scatter_reduce"}


class Seen(TorchDispatchMode):
    """The names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_no_atomics(device):
    """The operations of a final state: on a CPU `index_add` has a fixed order; `meta` stands for every other device."""
    x, index = torch.randn(6, 2, 3, device=device), torch.zeros(6, dtype=torch.int64, device=device)
    with Seen() as seen:
        assert layout.summed(x, index, 4).shape == (4, 2, 3)
    assert ("index_put" in seen.names) == (device == "meta"), seen.names
    assert bool(seen.names & ATOMIC) == (device == "cpu"), seen.names


def test_the_same_sum():
    """Both ways give what the definition says."""
    x, index = torch.randn(7, 5), torch.tensor([0, 2, 2, 0, 0, 3, 2])
    want = torch.stack([x[index == row].sum(0) for row in range(4)])
    torch.testing.assert_close(layout.summed(x, index, 4), want)
    torch.testing.assert_close(x.new_zeros(4, 5).index_put((index,), x, accumulate=True), want)


def test_final_states_go_that_way(monkeypatch):
    """Of an operator that continues and ends in a state: levels meet there."""
    counts = []
    plain = layout.summed

    def counted(x, index, rows):
        counts.append((len(index), int(index.unique().numel())))
        return plain(x, index, rows)

    monkeypatch.setattr(layout, "summed", counted)
    x = Operands(*operands(100, levels=9, state="level").values(), None)
    sequence.forward(x, 1.0, True)
    assert counts, "no final state was summed"
    assert all(distinct < entries for entries, distinct in counts)
