"""A converted model that is split into the stages of a pipeline: outputs and gradients are those of one process."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, SplitPoint, pipeline

import llcompile
from tests.helpers import small
from tests.helpers.processes import together

OPTIONS = {"inner": "eager"}
MICRO_BATCHES = 4


class Part(nn.Module):
    """One half of a `small.Model`, with the names that its parameters have there."""

    def __init__(self, model: small.Model, rank: int) -> None:
        super().__init__()
        self.embed = model.embed if rank == 0 else nn.Identity()
        self.layers = nn.ModuleDict({str(rank): model.layers[rank]})
        self.head = model.head if rank == 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers.values():
            x = layer(x)
        return self.head(x)


def by_hand(model: small.Model, tokens: Tensor, rank: int) -> PipelineStage:
    part = Part(model, rank)
    part.compile(backend="loglinear", options=OPTIONS)
    return PipelineStage(part, rank, 2, torch.device("cpu"))


def traced(model: small.Model, tokens: Tensor, rank: int) -> Any:
    """torch.export records the operator, so that a stage has it compiled or not."""
    pipe = pipeline(model, (tokens[:2],), split_spec={"layers.1": SplitPoint.BEGINNING})
    return pipe.build_stage(rank, torch.device("cpu"))


def traced_and_compiled(model: small.Model, tokens: Tensor, rank: int) -> Any:
    stage = traced(model, tokens, rank)
    stage.submod.compile(backend="loglinear", options=OPTIONS)
    return stage


def work(rank: int, cases: Sequence[tuple[Callable[..., Any], Any]]) -> None:
    tokens = small.ids(batch=2 * MICRO_BATCHES)
    model = small.model()
    llcompile.convert(model, tokens[:2], verify=False)
    plain = model(tokens)
    small.perturb(model)
    alone = copy.deepcopy(model)
    expected = torch.compile(alone, backend="loglinear", options=OPTIONS)(tokens)
    small.loss(expected, tokens).backward()
    assert small.difference(expected, plain) > 1e-2, "level weights do not act"
    for stage_of, schedule in cases:
        torch._dynamo.reset()
        check(stage_of(copy.deepcopy(model), tokens, rank), schedule, tokens, expected, alone)


def check(stage: Any, schedule: Any, tokens: Tensor, expected: Tensor, alone: nn.Module) -> None:
    run = schedule(stage, MICRO_BATCHES, loss_fn=small.loss)
    if stage.is_first:
        run.step(tokens)
    else:
        assert small.difference(run.step(target=tokens), expected) < 1e-6
    gradients = {name: p.grad for name, p in alone.named_parameters()}
    own = dict(stage.submod.named_parameters())
    assert sum("loglinear" in name for name in own) == 2
    for name, parameter in own.items():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0
        assert small.difference(parameter.grad, gradients[name]) < 1e-5, name
    counts = [0, 0]
    dist.all_gather_object(counts, len(own))
    assert sum(counts) == len(gradients)


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(((by_hand, Schedule1F1B),), marks=pytest.mark.slow),  # the example is the same, in short
        pytest.param(
            ((by_hand, ScheduleGPipe), (traced, ScheduleGPipe), (traced_and_compiled, Schedule1F1B)),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["by hand", "traced"],
)
def test_stages_are_one_process(cases: Any) -> None:
    together(work, cases)


def test_the_example_runs() -> None:
    """As its first lines say, on two processes."""
    example = Path(__file__).parents[2] / "examples" / "distributed" / "pipeline_parallel.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(example)]
    environment = {**os.environ, "LLCOMPILE_KERNELS": "aten", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "largest difference of a gradient" in done.stdout
