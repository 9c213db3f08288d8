"""DTensors, on one of two processes whose collectives send nothing; `tests/distributed` has real ones."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import fx
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from llcompile.torch_internals import dtensors


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


ROWS = torch.arange(12.0).view(4, 3)


def test_part_and_joined(mesh: DeviceMesh) -> None:
    x = dtensors.joined(ROWS, mesh, [Replicate()], ROWS.shape)
    assert dtensors.is_dtensor(x)
    assert not dtensors.is_dtensor(ROWS)
    assert torch.equal(dtensors.part(x, [Shard(0)]), ROWS[2:])
    assert torch.equal(dtensors.part(x, [Replicate()]), ROWS)
    again = dtensors.joined(ROWS[2:], mesh, [Shard(0)], (4, 3))
    assert again.shape == (4, 3)
    assert dtensors.whole(again).shape == (4, 3)
    assert dtensors.whole(ROWS) is ROWS


def test_possible_where_processes_know_of_each_other(mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    assert dtensors.possible()
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    assert not dtensors.possible()


def test_first_of_mesh(mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """Process 1 of 2 is not; a process with plain tensors is. At the end they wait, where there is a mesh."""
    waited: list[object] = []
    monkeypatch.setattr(dist, "barrier", lambda group: waited.append(group))
    x = distribute_tensor(ROWS, mesh, [Shard(0)], src_data_rank=None)
    with dtensors.first_of_mesh([ROWS, x]) as first:
        assert (first, waited) == (False, [])
    assert waited == [mesh.get_group(0)]
    with dtensors.first_of_mesh([ROWS]) as first:
        assert first
    assert len(waited) == 1


def test_like(mesh: DeviceMesh) -> None:
    x = distribute_tensor(torch.zeros(4, 3), mesh, [Shard(0)], src_data_rank=None)
    assert torch.equal(dtensors.part(dtensors.like(ROWS, x), [Shard(0)]), ROWS[2:])
    assert dtensors.like(ROWS, ROWS) is ROWS


def test_sharded_ways(mesh: DeviceMesh) -> None:
    placements = ([Shard(0)], [Replicate()])
    given = [distribute_tensor(ROWS, mesh, p, src_data_rank=None) for p in placements]
    assert [dtensors.sharded_ways(x) for x in (*given, ROWS)] == [2, 1, 1]


def test_what_is_read_on_all_and_what_is_not(mesh: DeviceMesh) -> None:
    """Plain tensors on the way in and out; the gradient of a shard is one."""
    weight = distribute_tensor(ROWS, mesh, [Shard(0)], src_data_rank=None).requires_grad_()
    kept = distribute_tensor(ROWS, mesh, [Replicate()], src_data_rank=None).requires_grad_()
    x = torch.ones(2, 3, requires_grad=True)
    read = dtensors.read_on_all(x, weight, (0,))
    own, all_of_it = dtensors.own_part(weight, weight, (0,)), dtensors.own_part(kept, weight, (0,))
    assert [dtensors.is_dtensor(t) for t in (read, own, all_of_it)] == [False] * 3
    assert torch.equal(own, ROWS[2:])
    assert dtensors.own_part(ROWS, weight, (0,)) is ROWS
    (read.sum() + own.sum() + all_of_it.sum()).backward()
    assert isinstance(weight.grad, DTensor)
    assert weight.grad.placements == (Shard(0),)
    assert isinstance(kept.grad, DTensor)
    assert kept.grad.placements == (Replicate(),)
    assert x.grad is not None


def test_as_dtensor(mesh: DeviceMesh) -> None:
    weight = distribute_tensor(ROWS, mesh, [Replicate()], src_data_rank=None)
    spread = dtensors.as_dtensor(ROWS, weight, (0,))
    assert isinstance(spread, DTensor)
    assert spread.shape == (8, 3)
    assert dtensors.as_dtensor(spread, weight, ()) is spread
    partial = DTensor.from_local(ROWS, mesh, [Partial()], run_check=False)
    assert dtensors.as_dtensor(partial, weight, ()) is partial


def test_moves() -> None:
    """By the names that Dynamo writes."""
    graph = fx.Graph()
    x = graph.placeholder("x")

    def prim_from_local(t: torch.Tensor) -> torch.Tensor:
        return t

    moves = [graph.call_function(prim_from_local, (x,)), graph.call_method("to_local", (x,))]
    assert [dtensors.is_move(n) for n in (*moves, x, graph.call_method("view", (x,)))] == [True, True, False, False]
