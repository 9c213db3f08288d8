"""What was made from a model before it was converted: states of optimizers, and averages."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import llcompile
from llcompile.errors import CheckpointError, LevelWeightsError
from llcompile.weights import optimizer_states
from tests.helpers.small import Model
from tests.helpers.trained import IDS, compiled, converted, levels, step

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def others(model: nn.Module) -> list[Tensor]:
    return [p for name, p in model.named_parameters() if ".loglinear" not in name]


def decayed(model: nn.Module) -> list[dict[str, list[Tensor]]]:
    return [{"params": [p for p in others(model) if (p.dim() > 1) is matrices]} for matrices in (True, False)]


def unpickled(model: nn.Module) -> nn.Module:
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


def same(model: nn.Module) -> nn.Module:
    return model


def compile_for_us(model: nn.Module) -> Any:
    return torch.compile(model, backend="loglinear")


class Ddp(nn.Module):
    """Holds the model as DistributedDataParallel does, without processes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model


# How the optimizer was built before the conversion, how it is afterwards, and what the converted model went through.
BUILT: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., nn.Module]]] = {
    "one group": (others, lambda model: model.parameters(), same),
    "level weights last": (others, lambda model: [*others(model), *levels(model)], same),
    "in a group of their own": (others, lambda model: [{"params": others(model)}, {"params": levels(model)}], same),
    "in a first group": (others, lambda model: [{"params": levels(model)}, {"params": others(model)}], same),
    "parameter_groups": (decayed, lambda model: llcompile.parameter_groups(model, 1e-2), same),
    "named": (lambda model: model.named_parameters(), lambda model: model.named_parameters(), same),
    "named, in another order": (
        lambda model: reversed(list(model.named_parameters())),
        lambda model: model.named_parameters(),
        same,
    ),
    "named by a wrapper": (
        lambda model: model.named_parameters(),
        lambda model: [(f"_orig_mod.{name}", p) for name, p in model.named_parameters()],
        same,
    ),
    "copied": (others, lambda model: model.parameters(), copy.deepcopy),
    "unpickled": (others, lambda model: model.parameters(), unpickled),
}


@pytest.mark.parametrize("case", BUILT)
def test_a_state_of_an_optimizer_from_before(case: str, plain_converted: nn.Module) -> None:
    before, after, change = BUILT[case]
    plain = Model()
    old = step(plain, before(plain))
    saved = copy.deepcopy(old.state_dict())
    moments = [old.state[p]["exp_avg"] for p in others(plain)]
    model = change(copy.deepcopy(plain_converted))
    optimizer = torch.optim.AdamW(after(model), 1e-2)
    optimizer.load_state_dict(saved)
    for p, moment in zip(others(model), moments, strict=True):
        torch.testing.assert_close(optimizer.state[p]["exp_avg"], moment, rtol=0, atol=0)
    assert not any(p in optimizer.state for p in levels(model))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all(int(optimizer.state[p]["step"]) == 2 for p in others(model))
    assert all(int(optimizer.state[p]["step"]) == 1 for p in levels(model))
    assert all(len(g.get("param_names", g["params"])) == len(g["params"]) for g in optimizer.param_groups)
    again = optimizer_states.fitted(optimizer, state := optimizer.state_dict())
    assert again is state  # one that was saved afterwards is left as it is


@pytest.fixture(scope="module")
def plain_converted() -> nn.Module:
    model = Model()
    llcompile.convert(model, IDS, verify=False)
    return model


def fewer_levels() -> nn.Module:
    model = Model()
    llcompile.convert(model, IDS, verify=False, options={"levels": 5})
    return model


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (lambda model: model.parameters(), lambda model: [*others(model), *levels(model)], "in another order"),
        (lambda model: model.parameters(), lambda _: fewer_levels().parameters(), "another kind or size"),
        (lambda model: others(model)[1:], lambda model: model.parameters(), r"groups of \[14\].*15 \+ 4 of level"),
        (decayed, lambda model: model.parameters(), "groups of .*15 . 4 of level weights"),
        (
            lambda model: [*model.named_parameters()][1:],
            lambda model: model.named_parameters(),
            "cannot be matched",
        ),
    ],
    ids=["another order", "other levels", "one is missing", "other groups", "a name is missing"],
)
def test_a_state_that_does_not_fit(
    before: Callable[..., Any], after: Callable[..., Any], said: str, plain_converted: nn.Module
) -> None:
    """Torch would load the first two, and fail in a later step, or not at all."""
    model = copy.deepcopy(plain_converted)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    old = torch.optim.AdamW(before(model), 1e-2)
    old.step()
    optimizer = torch.optim.AdamW(after(model), 1e-2)
    with pytest.raises(CheckpointError, match=said):
        optimizer.load_state_dict(old.state_dict())
    assert not optimizer.state
    fits = torch.optim.AdamW(before(model), 1e-2)
    fits.load_state_dict(old.state_dict())
    assert len(fits.state) == len(old.state) > 0


def test_hooks_of_the_user_come_first(plain_converted: nn.Module) -> None:
    """A hook that adapts a state is asked before what it returns is checked; and ours does not stay."""
    model = copy.deepcopy(plain_converted)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    good = optimizer.state_dict()
    optimizer.register_load_state_dict_pre_hook(lambda optimizer, state: good)
    optimizer.load_state_dict({"state": {}, "param_groups": []})
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == 1


def test_states_by_name_both_ways(plain_converted: nn.Module) -> None:
    """Of torch.distributed.checkpoint, and as it asks for them: not strict where one side has no level weights."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_state_dict

    plain, model = Model(), copy.deepcopy(plain_converted)
    old, new = step(plain), torch.optim.AdamW([{"params": others(model)}, {"params": levels(model), "lr": 0.3}], 1e-2)
    loose = StateDictOptions(strict=False)
    with pytest.raises(RuntimeError, match=r"Missing optimizer state for parameter 'layers\.0\.loglinear\.weight'"):
        set_state_dict(model, new, model_state_dict={}, optim_state_dict=get_optimizer_state_dict(plain, old))
    set_state_dict(
        model, new, model_state_dict={}, optim_state_dict=get_optimizer_state_dict(plain, old), options=loose
    )
    moments = [[o.state[p]["exp_avg"] for p in others(m)] for o, m in ((old, plain), (new, model))]
    torch.testing.assert_close(moments[1], moments[0], rtol=0, atol=0)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    new.step()
    assert [group["lr"] for group in new.param_groups] == [1e-2, 0.3]
    back = torch.optim.AdamW(plain.parameters(), 1e-2)
    set_state_dict(
        plain, back, model_state_dict={}, optim_state_dict=get_optimizer_state_dict(model, new), options=loose
    )
    moments = [[o.state[p]["exp_avg"] for p in others(m)] for o, m in ((new, model), (back, plain))]
    torch.testing.assert_close(moments[1], moments[0], rtol=0, atol=0)
    assert len(back.state) == len(others(plain))


def test_a_distributed_checkpoint_from_before(plain_converted: nn.Module, tmp_path: Path) -> None:
    """Read in part: level weights stay as they are, without moments."""
    from torch.distributed import checkpoint as distributed
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    plain, model = Model(), copy.deepcopy(plain_converted)
    old, new = step(plain), torch.optim.AdamW(model.parameters(), 1e-2)
    saved = dict(zip(("model", "optimizer"), get_state_dict(plain, old), strict=True))
    distributed.save(saved, checkpoint_id=tmp_path)
    state = dict(zip(("model", "optimizer"), get_state_dict(model, new), strict=True))
    with pytest.raises(BaseException, match=r"Missing key in checkpoint state_dict.*loglinear"):
        distributed.load(copy.deepcopy(state), checkpoint_id=tmp_path)
    planner = distributed.DefaultLoadPlanner(allow_partial_load=True)
    distributed.load(state, checkpoint_id=tmp_path, planner=planner)
    parts = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
    set_state_dict(model, new, **parts, options=StateDictOptions(strict=False))
    torch.testing.assert_close(others(model), others(plain), rtol=0, atol=0)
    assert all(weights.is_identity() for weights in model.modules() if isinstance(weights, llcompile.LevelWeights))
    moments = [[o.state[p]["exp_avg"] for p in others(m)] for o, m in ((old, plain), (new, model))]
    torch.testing.assert_close(moments[1], moments[0], rtol=0, atol=0)
    assert not any(new.state[p]["exp_avg"].any() for p in levels(model))


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


@pytest.mark.parametrize("average_of", [same, compile_for_us], ids=["plain", "compiled"])
@pytest.mark.parametrize("updated_with", [same, compile_for_us, Ddp], ids=["plain", "compiled", "DDP"])
def test_an_average_from_before_of_a_wrapped_model(
    average_of: Callable[..., nn.Module], updated_with: Callable[..., nn.Module], plain_converted: nn.Module
) -> None:
    average = AveragedModel(average_of(Model()))
    model = copy.deepcopy(plain_converted)
    average.update_parameters(updated_with(model))
    assert len(levels(average)) == len(levels(model)) > 0
    torch.testing.assert_close(list(average.parameters()), list(model.parameters()), rtol=0, atol=0)


def test_an_average_of_another_structure(plain_converted: nn.Module) -> None:
    average = AveragedModel(nn.Sequential(Model()))  # its layers have other names
    with pytest.raises(LevelWeightsError, match=r"average of Sequential has 15 parameters, and Model has 19"):
        average.update_parameters(plain_converted)
    assert average.n_averaged == 0
