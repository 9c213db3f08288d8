"""Meshes of two dimensions, on four processes: outputs and gradients are those of one process."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module

import llcompile
from tests.helpers import small
from tests.helpers.processes import together
from tests.helpers.split import LEVELS, OPTIONS, PLAN, Split, perturb, whole

RANKS, LENGTH = 4, 17


def converted(tokens: Tensor) -> tuple[nn.Module, nn.Module]:
    """A converted model that is to be split, and one that stays whole."""
    torch.manual_seed(0)
    model = small.Model([Split()])
    llcompile.convert(model, tokens[:1], verify=False)
    one = copy.deepcopy(model)
    perturb(one)
    return model, one


def compiled(model: nn.Module) -> Callable[..., Tensor]:
    return torch.compile(model, backend="loglinear", options=OPTIONS)  # type: ignore[return-value]


def alone(one: nn.Module, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients on one process; the level weights act."""
    linear = one(tokens).detach()
    out = compiled(one)(tokens)
    out.square().mean().backward()
    torch._dynamo.reset()
    assert small.difference(linear, out) > 1e-3
    return out.detach(), {n: p.grad for n, p in one.named_parameters() if p.grad is not None}


def check(model: nn.Module, out: Tensor, expected: Tensor, gradients: dict[str, Tensor]) -> None:
    """The same numbers, and after a step the same parameters on all processes, to the bit."""
    assert small.difference(out, expected) < 1e-5
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert small.difference(whole(p.grad), gradients[name]) < 1e-4, name
    assert any("loglinear" in name and g.abs().max() > 0 for name, g in gradients.items())
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    flat = torch.cat([whole(p).detach().flatten() for p in model.parameters()])
    all_of_them = [torch.empty_like(flat) for _ in range(RANKS)]
    dist.all_gather(all_of_them, flat)
    assert all(torch.equal(flat, other) for other in all_of_them), "the processes' parameters differ"


def sharded(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    for layer in model.layers:  # type: ignore[union-attr]
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)  # type: ignore[return-value]


def data_and_tensor(rank: int) -> None:
    """FSDP2 over "dp", tensor parallel over "tp"."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    tokens = small.ids(batch=4, length=LENGTH)
    model, one = converted(tokens)
    expected, gradients = alone(one, tokens)
    parallelize_module(model, mesh["tp"], {**PLAN, **LEVELS})
    perturb(model)
    sharded(model, mesh["dp"])
    row = mesh.get_local_rank("dp")
    out = compiled(model)(tokens.chunk(2)[row])
    out.square().mean().backward()
    check(model, out, expected.chunk(2)[row], gradients)


def hybrid(rank: int) -> None:
    """FSDP2 that replicates over one dimension and shards over the other."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    tokens = small.ids(batch=4, length=LENGTH)
    model, one = converted(tokens)
    expected, gradients = alone(one, tokens)
    perturb(model)
    sharded(model, mesh)
    out = compiled(model)(tokens.chunk(RANKS)[rank])
    out.square().mean().backward()
    check(model, out, expected.chunk(RANKS)[rank], gradients)


def each(rank: int, works: tuple[Callable[[int], None], ...]) -> None:
    for work in works:
        torch._dynamo.reset()
        work(rank)


@pytest.mark.slow
def test_two_dimensions() -> None:
    """FSDP2 with tensor parallel, and FSDP2 over both dimensions."""
    together(each, (data_and_tensor, hybrid), ranks=RANKS)
