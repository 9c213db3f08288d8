"""A converted model on two processes: DDP and FSDP2 train it as one process does, level weights included."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import llcompile
from tests.helpers import small
from tests.helpers.processes import together

RANKS = 2
OPTIONS = {"inner": "eager"}


def ddp_compiled(model: nn.Module) -> Any:
    """Dynamo's DDP optimizer splits the graph at a bucket of gradients."""
    return torch.compile(
        nn.parallel.DistributedDataParallel(model, bucket_cap_mb=1), backend="loglinear", options=OPTIONS
    )


def ddp_of_compiled(model: nn.Module) -> Any:
    compiled: Any = torch.compile(model, backend="loglinear", options=OPTIONS)
    return nn.parallel.DistributedDataParallel(compiled, bucket_cap_mb=1)


def sharded(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in model.layers:  # type: ignore[union-attr]
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def sharded_and_compiled(model: nn.Module) -> Any:
    return torch.compile(sharded(model), backend="loglinear", options=OPTIONS)


def compiled_layers_sharded(model: nn.Module) -> Any:
    for layer in model.layers:  # type: ignore[union-attr]
        layer.compile(backend="loglinear", options=OPTIONS)
    return sharded(model)


def train(net: Callable[[Tensor], Tensor], model: nn.Module, tokens: Tensor) -> list[float]:
    """The losses of three steps, on this process's part of the tokens."""
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.1), []
    for _ in range(3):
        loss = small.loss(net(tokens), tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


def whole(parameter: Tensor) -> Tensor:
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter.detach()


Wrap = Callable[[nn.Module], Any]


def work(rank: int, wraps: Sequence[Wrap]) -> None:
    tokens = small.ids(batch=2 * RANKS)
    converted = small.model(width=256, heads=8, size=32)  # of several buckets of gradients: the smallest holds 1 MiB
    llcompile.convert(converted, tokens, verify=False)
    small.perturb(converted)
    alone = copy.deepcopy(converted)
    expected = train(torch.compile(alone, backend="loglinear", options=OPTIONS), alone, tokens)
    for wrap in wraps:
        torch._dynamo.reset()
        check(wrap, copy.deepcopy(converted), tokens.chunk(RANKS)[rank], alone, expected)


def check(wrap: Wrap, model: nn.Module, tokens: Tensor, alone: nn.Module, expected: list[float]) -> None:
    """The model, trained on a part of the tokens on each process, becomes the one that was trained alone on all."""
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "loglinear" in name}
    losses = torch.tensor(train(wrap(model), model, tokens))
    dist.all_reduce(losses)
    torch.testing.assert_close(losses / RANKS, torch.tensor(expected), rtol=1e-5, atol=0)
    trained = dict(alone.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(whole(parameter), trained[name].detach(), rtol=1e-4, atol=1e-6)
        assert name not in before or not torch.equal(whole(parameter), before[name]), f"{name} was not trained"


@pytest.mark.parametrize(
    "wraps",
    [
        (ddp_compiled, sharded_and_compiled),
        pytest.param((ddp_of_compiled, compiled_layers_sharded), marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_as_one(wraps: Sequence[Wrap]) -> None:
    """Losses, parameters and level weights after three steps are those of one process with all of the batch."""
    together(work, wraps, ranks=RANKS)
