"""Checkpoints of models of the user's own, and what was made from a model before it was converted."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import llcompile
from llcompile.errors import CheckpointError, ModelError
from llcompile.weights import made_before
from tests.helpers.small import Model, TwoMixers

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

IDS = torch.arange(24).reshape(2, 12)


def levels(model: nn.Module) -> list[Tensor]:
    return [p for name, p in model.named_parameters() if ".loglinear" in name]


def compiled(model: nn.Module) -> Tensor:
    return torch.compile(model, backend="loglinear", options={"inner": "eager"})(IDS)  # type: ignore[no-any-return]


def converted(model: nn.Module) -> nn.Module:
    llcompile.convert(model, IDS, verify=False)
    for p in levels(model):
        nn.init.normal_(p)
    return model


def step(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    model(IDS).square().mean().backward()
    optimizer.step()
    return optimizer


def test_saved_and_loaded_without_inputs(tmp_path: Path) -> None:
    model = converted(Model([TwoMixers()]))
    llcompile.save(model, tmp_path / "model.safetensors")
    fresh = Model([TwoMixers()])
    assert llcompile.load(fresh, tmp_path / "model.safetensors") == 2
    torch.testing.assert_close(compiled(fresh), compiled(model), rtol=0, atol=0)
    places = [m.place for m in fresh.modules() if isinstance(m, llcompile.LevelWeights)]
    assert places == [m.place for m in model.modules() if isinstance(m, llcompile.LevelWeights)]
    assert None not in places  # of two mixers of a module each gets its own
    assert llcompile.load(fresh, tmp_path / "model.safetensors") == 0


def test_a_file_that_does_not_fit(tmp_path: Path) -> None:
    llcompile.save(converted(Model()), tmp_path / "model.safetensors")
    other = Model(width=24)
    with pytest.raises(CheckpointError, match="does not fit Model"):
        llcompile.load(other, tmp_path / "model.safetensors")
    assert not levels(other)
    with pytest.raises(ModelError):
        llcompile.save("model", tmp_path / "model.safetensors")  # type: ignore[arg-type]


def test_a_model_on_meta(tmp_path: Path) -> None:
    """Level weights get their values; a file of the whole model is refused, for copies to meta are lost."""
    model = converted(Model())
    llcompile.save(model, tmp_path / "model.safetensors")
    with torch.device("meta"):
        empty = Model()
    with pytest.raises(CheckpointError, match=r"embed\.weight and 14 more of its tensors are on device meta"):
        llcompile.load(empty, tmp_path / "model.safetensors")
    assert not levels(empty)
    assert llcompile.load_levels(empty, tmp_path / "model.safetensors") == 2
    torch.testing.assert_close(levels(empty), levels(model), rtol=0, atol=0)
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in llcompile.level_parameters(empty))
    empty.load_state_dict(model.state_dict(), assign=True)
    torch.testing.assert_close(compiled(empty), compiled(model), rtol=0, atol=0)


def test_converted_on_meta() -> None:
    with torch.device("meta"):
        empty = Model()
    llcompile.convert(empty, IDS.to("meta"), verify=False)
    empty.to_empty(device="cpu")
    model = converted(Model())
    empty.load_state_dict(model.state_dict())
    torch.testing.assert_close(compiled(empty), compiled(model), rtol=0, atol=0)
    assert (compiled(model) - model(IDS)).abs().max() > 1e-2


def test_torch_distributed_checkpoint(tmp_path: Path) -> None:
    """In one process, as a user would without a group; the optimizer's state too."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model, other = converted(Model()), converted(Model())
    optimizer, fresh = (torch.optim.AdamW(m.parameters(), 1e-2) for m in (model, other))
    compiled(model).square().mean().backward()
    optimizer.step()
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    checkpoint.save(state, checkpoint_id=tmp_path)
    read = dict(zip(("model", "optimizer"), get_state_dict(other, fresh), strict=True))
    checkpoint.load(read, checkpoint_id=tmp_path)
    set_state_dict(other, fresh, model_state_dict=read["model"], optim_state_dict=read["optimizer"])
    torch.testing.assert_close(compiled(other), compiled(model), rtol=0, atol=0)
    assert (compiled(model) - model(IDS)).abs().max() > 1e-2
    moments = [[o.state[p]["exp_avg"] for p in o.param_groups[0]["params"]] for o in (optimizer, fresh)]
    torch.testing.assert_close(moments[1], moments[0], rtol=0, atol=0)


def test_a_checkpoint_from_before() -> None:
    model, before = Model(), Model().state_dict()
    llcompile.convert(model, IDS, verify=False)
    with pytest.raises(RuntimeError, match=r"llcompile\.convert has attached") as caught:
        model.load_state_dict(before)
    assert str(caught.value).count("strict=False") == 1
    assert len(model.load_state_dict(before, strict=False).missing_keys) == 6  # two tensors and a descriptor for each


@pytest.mark.parametrize("group", ["one group", "level weights in one of their own"])
def test_a_state_of_an_optimizer_from_before(group: str) -> None:
    plain = Model()
    saved = copy.deepcopy(step(plain).state_dict())
    model = Model()
    model.load_state_dict(plain.state_dict())
    llcompile.convert(model, IDS, verify=False)
    names = dict(model.named_parameters())
    others = [p for n, p in names.items() if ".loglinear" not in n]
    groups = [{"params": others}, {"params": levels(model)}] if group != "one group" else list(names.values())
    optimizer = torch.optim.AdamW(groups, 1e-2)  # type: ignore[arg-type]
    optimizer.load_state_dict(saved)
    for number, p in enumerate(others):
        torch.testing.assert_close(optimizer.state[p]["exp_avg"], saved["state"][number]["exp_avg"], rtol=0, atol=0)
    assert not any(p in optimizer.state for p in levels(model))
    compiled(model).square().mean().backward()
    optimizer.step()
    assert all(int(optimizer.state[p]["step"]) == 2 for p in others)
    assert all(int(optimizer.state[p]["step"]) == 1 for p in levels(model))
    again = made_before.with_room(optimizer, state := optimizer.state_dict())
    assert again is state  # one that was saved afterwards is left as it is


def test_an_average_from_before() -> None:
    model = Model()
    average = AveragedModel(model)
    average.update_parameters(model)
    converted(model)
    average.update_parameters(model)
    first = [p.detach().clone() for p in levels(model)]
    torch.testing.assert_close([*levels(average)], first, rtol=0, atol=0)
    torch.testing.assert_close(compiled(average.module), compiled(model), rtol=0, atol=0)
    with torch.no_grad():
        for p in levels(model):
            p.add_(3.0)
    average.update_parameters(model)
    torch.testing.assert_close([*levels(average)], [p + 1.0 for p in first])  # the third of three
