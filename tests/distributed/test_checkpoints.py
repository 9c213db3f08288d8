"""Checkpoints of converted models that are sharded over processes: written by two, read by one and by two."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard

import llcompile
from llcompile.errors import CheckpointError
from tests.helpers import small
from tests.helpers.processes import together

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

Values = dict[str, Tensor]


def converted(seed: int = 0) -> nn.Module:
    model = small.model(seed)
    llcompile.convert(model, small.ids(), verify=False)
    small.perturb(model, seed=seed)
    return model


def shard(model: nn.Module) -> nn.Module:
    for layer in model.layers:  # type: ignore[union-attr]
        fully_shard(layer)
    return fully_shard(model)


def whole(tensor: Any) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()  # type: ignore[no-any-return]


def values(model: nn.Module) -> Values:
    return {name: whole(tensor) for name, tensor in model.state_dict().items()}


def only_levels(found: Values) -> Values:
    return {name: tensor for name, tensor in found.items() if ".loglinear" in name}


def moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> Values:
    return {name: whole(optimizer.state[p]["exp_avg"]) for name, p in model.named_parameters()}


def same(actual: Values, expected: Values) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def read(model: nn.Module, folder: Path) -> torch.optim.Optimizer:
    """Torch's recipe: of what the model and its optimizer have, the values in the folder."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    checkpoint.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return optimizer


def write(rank: int, folder: Path) -> None:
    model = shard(converted())
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    tokens = small.ids(batch=4).chunk(2)[rank]
    run = torch.compile(model, backend="loglinear", options={"inner": "eager"})
    small.loss(run(tokens), tokens).backward()
    optimizer.step()
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    checkpoint.save(state, checkpoint_id=folder / "dcp")
    wanted = values(model), moments(model, optimizer)
    if rank == 0:
        torch.save(wanted, folder / "wanted.pt")


def read_sharded(rank: int, folder: Path) -> None:
    expected, expected_moments = torch.load(folder / "wanted.pt")
    model = shard(converted(seed=1))
    optimizer = read(model, folder / "dcp")
    same(values(model), expected)
    same(moments(model, optimizer), expected_moments)


@pytest.mark.slow
def test_torch_distributed_checkpoint(tmp_path: Path) -> None:
    """Written by two processes; read by two, by one, and by one into a model that is converted afterwards."""
    together(write, tmp_path)
    together(read_sharded, tmp_path)
    expected, expected_moments = torch.load(tmp_path / "wanted.pt")
    assert any(moment.abs().max() > 0 for moment in only_levels(expected_moments).values())

    model = converted(seed=1)
    assert any(not torch.equal(tensor, expected[name]) for name, tensor in only_levels(values(model)).items())
    optimizer = read(model, tmp_path / "dcp")
    same(values(model), expected)
    same(moments(model, optimizer), expected_moments)

    later = small.model(seed=1)
    read(later, tmp_path / "dcp")
    same(values(later), {name: t for name, t in expected.items() if ".loglinear" not in name})
    llcompile.convert(later, small.ids(), verify=False)
    optimizer = read(later, tmp_path / "dcp")  # once more, for the level weights
    same(values(later), expected)
    same(moments(later, optimizer), expected_moments)


def levels_alone(rank: int, folder: Path) -> None:
    model = converted()
    expected = only_levels(values(model))
    sharded = shard(copy.deepcopy(model))
    file = folder / "levels.safetensors"
    assert llcompile.save_levels(sharded, file) == 2  # the same file from all processes
    plain = small.model()
    assert llcompile.load_levels(plain, file) == 2
    same(only_levels(values(plain)), expected)

    other = shard(converted(seed=1))
    before = values(other)
    assert llcompile.load_levels(other, file) == 2
    same(only_levels(values(other)), expected)
    same(
        {n: t for n, t in values(other).items() if n not in expected}, {n: before[n] for n in before.keys() - expected}
    )
    loss = small.loss(torch.compile(other, backend="loglinear", options={"inner": "eager"})(small.ids()), small.ids())
    loss.backward()
    assert all(p.grad is not None for p in llcompile.level_parameters(other))
    on_meta(file, model)
    refused(rank, folder, model)


def on_meta(file: Path, model: nn.Module) -> None:
    """The way of large models: made on meta, sharded, filled; the level weights first or last."""
    for first in (True, False):
        with torch.device("meta"):
            empty = small.model()
        llcompile.convert(empty, small.ids().to("meta"), verify=False)
        empty = shard(empty)
        if first:
            llcompile.load_levels(empty, file)
            assert not any(p.is_meta for p in llcompile.level_parameters(empty))
            same(only_levels(values(empty)), only_levels(values(model)))
            continue
        empty.to_empty(device="cpu")
        state = model.state_dict() if dist.get_rank() == 0 else {}
        everywhere = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(empty, state, options=everywhere)
        same(values(empty), values(model))
        llcompile.load_levels(empty, file)
        same(values(empty), values(model))


def refused(rank: int, folder: Path, model: nn.Module) -> None:
    """A file has whole tensors, and one of other level weights does not fit; the model is as it was."""
    other = small.model()
    llcompile.convert(other, small.ids(), verify=False, options={"levels": 5})
    llcompile.save_levels(other, folder / f"other{rank}")
    llcompile.save(model, folder / f"whole{rank}")
    sharded = shard(converted(seed=1))
    before = values(sharded)
    with pytest.raises(CheckpointError, match=r"level weights are kind='linear', heads=2, levels=5"):
        llcompile.load_levels(sharded, folder / f"other{rank}")
    with pytest.raises(CheckpointError, match=r"is sharded over processes.*torch\.distributed\.checkpoint"):
        llcompile.load(sharded, folder / f"whole{rank}")
    with pytest.raises(CheckpointError, match=r"is sharded over processes.*torch\.distributed\.checkpoint"):
        llcompile.save(sharded, folder / f"whole{rank}")
    same(values(sharded), before)


@pytest.mark.slow
def test_level_weights_alone(tmp_path: Path) -> None:
    """Saved from FSDP2 and loaded into it, also while it is on meta."""
    together(levels_alone, tmp_path)
