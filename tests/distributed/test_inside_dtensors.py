"""Mixers whose inputs and projections stay DTensors, groups of heads, and the heads of a hand-written Mamba-2."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

import llcompile
from llcompile.distributed import LevelWeightsParallel
from llcompile.errors import LevelWeightsError
from llcompile.passes.head_split import HeadSplit, expect_even
from tests.helpers import small
from tests.helpers.processes import together
from tests.helpers.split import OPTIONS, PLAN, Split, mesh, perturb, whole


class Block(nn.Module):
    """A norm, a mixer, and the residual around both."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.norm, self.mixer = nn.LayerNorm(16), mixer

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mixer(self.norm(x))


class Grouped(Split):
    """Two heads of values for each head of queries and keys, as qwen3_next has them."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(16, 2 * self.size), nn.Linear(16, 2 * self.size)

    def mixed(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, self.size)) for f in (self.q, self.k, self.v))
        q, k = (y.repeat_interleave(v.shape[2] // y.shape[2], 2) for y in (q, k))
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        scores = (q.transpose(1, 2) @ k.transpose(1, 2).mT).masked_fill(future, 0.0)
        return (scores @ v.transpose(1, 2)).transpose(1, 2) / x.shape[1]


class Mamba2(nn.Module):
    """Mamba-2 with a projection for each of its operands; its convolution is written as a sum of shifts."""

    def __init__(self, width: int = 16, heads: int = 4, size: int = 8, state: int = 8, taps: int = 3) -> None:
        super().__init__()
        self.size, self.state = size, state
        self.z, self.x = nn.Linear(width, heads * size, bias=False), nn.Linear(width, heads * size, bias=False)
        self.B, self.C = nn.Linear(width, state, bias=False), nn.Linear(width, state, bias=False)
        self.dt = nn.Linear(width, heads)  # its bias is what the papers call dt_bias
        self.taps = nn.Parameter(torch.randn(taps, heads * size) / taps)
        self.A_log, self.D = nn.Parameter(torch.rand(heads)), nn.Parameter(torch.ones(heads))
        self.out = nn.Linear(heads * size, width, bias=False)

    def forward(self, u: Tensor) -> Tensor:
        x = self.x(u)
        x = F.silu(sum(F.pad(x, (0, 0, i, 0))[:, : x.shape[1]] * tap for i, tap in enumerate(self.taps)))
        B, C = (f(u).unflatten(-1, (1, self.state)) for f in (self.B, self.C))
        heads = x.unflatten(-1, (-1, self.size))
        y = mamba2_chunk_scan(heads, F.softplus(self.dt(u)), -self.A_log.exp(), B, C, chunk_size=16)
        y = y + heads * self.D.unsqueeze(-1)
        return self.out(y.flatten(-2) * F.silu(self.z(u)))


STAYS: dict[str, Any] = {"use_local_output": False}
LEVELS = {"layers.*.mixer.loglinear": LevelWeightsParallel()}
AROUND = {
    "layers.0": PrepareModuleInput(
        input_layouts=(Replicate(),), desired_input_layouts=(Shard(1),), use_local_output=False
    ),
    "layers.*.norm": SequenceParallel(**STAYS),
    "layers.*.mixer": PrepareModuleInput(
        input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),), use_local_output=False
    ),
    "layers.*.mixer.out": RowwiseParallel(output_layouts=Shard(1), **STAYS),
    "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
}


def compared(layer: nn.Module, split: Callable[[nn.Module], object]) -> None:
    """A converted model that is then split computes and learns as on one process."""
    torch.manual_seed(0)
    model, tokens = small.Model([layer]), small.ids(length=20)
    llcompile.convert(model, tokens, verify=False)
    one = copy.deepcopy(model)
    perturb(one)
    linear = one(tokens).detach()
    expected, gradients = trained(one, tokens)
    torch._dynamo.reset()
    split(model)
    perturb(model)
    out, found = trained(model, tokens)
    assert small.difference(linear, expected) > 1e-3, "level weights do not act"
    assert small.difference(out, expected) < 1e-5
    assert gradients.keys() == found.keys()
    for name, gradient in gradients.items():
        assert small.difference(found[name], gradient) < 1e-4, name


def trained(model: nn.Module, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    out = torch.compile(model, backend="loglinear", options=OPTIONS)(tokens)
    small.loss(out, tokens).backward()
    return out.detach(), {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}


def mamba2(rank: int) -> None:
    """The heads are split, B and C are whole on each process; around the mixers, norms have a part of the tokens."""
    columns = {f"layers.*.mixer.{n}": ColwiseParallel(**STAYS) for n in ("z", "x", "dt")}

    def split(model: nn.Module) -> None:
        on = mesh()
        parallelize_module(model, on, {**columns, **AROUND, **LEVELS})
        mixer = model.layers[0].mixer  # type: ignore[index,union-attr]
        for name, dim in (("A_log", 0), ("D", 0), ("taps", 1)):
            setattr(mixer, name, nn.Parameter(distribute_tensor(getattr(mixer, name).detach(), on, [Shard(dim)])))
        distribute_module(mixer, on)  # what is left of it: B and C

    compared(Block(Mamba2()), split)


def grouped(rank: int) -> None:
    """Level weights belong to the heads of values, whatever queries and keys share."""
    levels = {"layers.*.loglinear": LevelWeightsParallel()}
    kept = {n: style for n, style in PLAN.items() if n.rpartition(".")[2] in ("q", "k", "v", "out")}
    compared(Grouped(), lambda m: parallelize_module(m, mesh(), {**kept, **levels}))


def test_uneven_heads() -> None:
    """A split is known to be uneven by the size of its axis and the number of processes."""
    of_two: Any = SimpleNamespace(size=lambda i: 2)
    expect_even("here", HeadSplit(of_two, (0,), (), False, 6))
    with pytest.raises(LevelWeightsError, match=r"mixer at here is split over 2 processes along an axis of size 5"):
        expect_even("here", HeadSplit(of_two, (0,), (), False, 5))


@pytest.mark.slow
@pytest.mark.parametrize("work", [mamba2, grouped])
def test_as_on_one_process(work: Any) -> None:
    together(work)
