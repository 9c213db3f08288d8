"""Level weights inside of other libraries' wrappers: what counts is where they hang and what is inside.

The wrappers here are built as PEFT's are; `trainers/test_peft.py` is about PEFT itself.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import llcompile
from llcompile.errors import CheckpointError, LevelWeightsFrozenWarning, LevelWeightsIgnoredWarning
from llcompile.weights import adapter_files, adapters
from tests.helpers import small

IDS = small.ids()
EAGER = {"inner": "eager"}


class Saved(nn.Module):
    """A module with a copy for each adapter, of which one is in use, as PEFT's `ModulesToSaveWrapper`."""

    def __init__(self, original: nn.Module, *adapters: str) -> None:
        super().__init__()
        self.original_module = original.requires_grad_(False)
        self.modules_to_save = nn.ModuleDict({a: copy.deepcopy(original).requires_grad_() for a in adapters})
        self.active_adapters = list(adapters[:1])
        self.disable_adapters = False

    def forward(self, x: Tensor | None) -> Any:
        name = next(iter(self.active_adapters), "")
        off = self.disable_adapters or name not in self.modules_to_save
        return (self.original_module if off else self.modules_to_save[name])(x)


class Asking(Saved):
    """That finds what it has not in the module in use, as PEFT's does."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            pass
        if "_modules" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.modules_to_save[self.active_adapters[0]], name)


class Around(nn.Module):
    """A wrapper that nobody has heard of."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor | None) -> Any:
        return self.inner(x)


def converted(layers: int = 1) -> Any:
    torch.manual_seed(0)
    model = small.Model([small.DeltaMixer() for _ in range(layers)])
    assert len(llcompile.convert(model, IDS, verify=False).converted) == layers
    small.perturb(model)
    return model


def compiled(model: nn.Module) -> Any:
    torch._dynamo.reset()
    model.compile(backend="loglinear", options=EAGER)
    return model


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS)  # type: ignore[no-any-return]


def change(weights: Any) -> None:
    with torch.no_grad():
        for p in weights.parameters():
            p.add_(1.0)


@pytest.mark.parametrize("wrap", [lambda m: Around(Around(m)), lambda m: Around(Saved(m, "one"))])
def test_in_an_unknown_wrapper(wrap: Callable[[nn.Module], nn.Module], fresh_dynamo: None) -> None:
    model = converted()
    expected = output(compiled(model))
    layer = model.layers[0]
    layer.loglinear = wrap(layer.loglinear)
    compiled(model)
    assert small.difference(output(model), expected) < 1e-6
    small.loss(model(IDS), IDS).backward()
    grads = [p.grad for p in layer.loglinear.parameters() if p.requires_grad]
    assert grads
    assert all(grad is not None and grad.abs().max() > 0 for grad in grads)
    change(layer.loglinear)
    assert small.difference(output(model), expected) > 1e-3


def test_the_copy_in_use_counts(fresh_dynamo: None) -> None:
    """Of the active adapter; of the base model where adapters are off, or where the active one has no copy."""
    model = converted()
    layer = model.layers[0]
    base = layer.loglinear
    layer.loglinear = wrapper = Saved(base, "one", "two")
    compiled(model)
    cases = [
        (["one"], False, wrapper.modules_to_save["one"]),
        (["two"], False, wrapper.modules_to_save["two"]),
        (["three"], False, base),
        ([], False, base),
        (["one"], True, base),
    ]
    for active, off, used in cases:
        wrapper.active_adapters, wrapper.disable_adapters = active, off
        assert {id(p) for p in llcompile.level_parameters(model)} == {id(p) for p in used.parameters()}, active
        before = output(model)
        for other in (base, *wrapper.modules_to_save.values()):
            if other is not used:
                change(other)
        assert torch.equal(output(model), before), active
        change(used)
        assert small.difference(output(model), before) > 1e-3, active


def test_run_eagerly_the_copy_in_use_is_missed(fresh_dynamo: None) -> None:
    """Where it is no longer 1, and only then."""
    model = converted()
    layer = model.layers[0]
    layer.loglinear.set_to_one()
    layer.loglinear = wrapper = Saved(layer.loglinear, "one", "two")
    change(wrapper.modules_to_save["two"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", LevelWeightsIgnoredWarning)
        output(model)
    wrapper.active_adapters = ["two"]
    with pytest.warns(LevelWeightsIgnoredWarning, match="no longer 1"):
        output(model)


@pytest.mark.parametrize("look", [llcompile.inspect, functools.partial(llcompile.convert, verify=False)])
def test_a_wrapper_stays_where_it_is(look: Callable[..., Any], fresh_dynamo: None) -> None:
    """In a conversion that finds the level weights there, and in an inspection: both put back what they find."""
    model = converted()
    model.layers[0].loglinear = wrapper = Saved(model.layers[0].loglinear, "one", "two")
    change(wrapper.modules_to_save["one"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert len(look(model, IDS).converted) == 1
    assert model.layers[0].loglinear is wrapper
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


class Broken(small.DeltaMixer):
    """Its operands come from another graph than they are mixed in, so the level weights read the mixer's input."""

    def operands(self, x: Tensor) -> tuple[Tensor, ...]:
        operands = super().operands(x)
        torch._dynamo.graph_break()
        return operands


def test_the_copy_in_use_reads_the_input_behind_a_graph_break(fresh_dynamo: None) -> None:
    torch.manual_seed(0)
    model: Any = small.Model([Broken()])
    assert len(llcompile.convert(model, IDS, verify=False).converted) == 1
    small.perturb(model)
    expected = output(compiled(model))
    layer = model.layers[0]
    layer.loglinear = wrapper = Saved(layer.loglinear, "one")
    change(wrapper.original_module)
    compiled(model)
    assert small.difference(output(model), expected) < 1e-6
    change(wrapper.modules_to_save["one"])
    assert small.difference(output(model), expected) > 1e-3


@pytest.mark.parametrize("regional", [pytest.param(False, marks=pytest.mark.slow), True])
def test_frozen_level_weights_are_said_once(regional: bool, fresh_dynamo: None) -> None:
    """Not for each layer, not for each call; and a model that is made later is told of its own."""
    said = []
    for _ in range(2):
        model = converted(layers=2)
        for name, p in model.named_parameters():
            p.requires_grad_("head" in name or name.endswith("out.weight"))
        for part in model.layers if regional else [model]:
            part.compile(backend="loglinear", options=EAGER)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for ids in (IDS, small.ids(length=30)):
                small.loss(model(ids), ids).backward()
        said.append([str(w.message) for w in caught if issubclass(w.category, LevelWeightsFrozenWarning)])
    assert [len(messages) for messages in said] == [1, 1]
    assert "modules_to_save=['loglinear']" in said[0][0]


def tensors(model: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in model.state_dict().items() if "loglinear" in name}


@pytest.mark.parametrize("prefix", [pytest.param("", marks=pytest.mark.slow), "base_model.model."])
def test_a_file_of_an_adapter_makes_room(prefix: str, fresh_dynamo: None) -> None:
    """By the descriptors among its tensors: the right kind and sizes, at their start."""
    model = converted()
    other = small.Model([small.DeltaMixer()])
    other.load_state_dict({n: t for n, t in model.state_dict().items() if "loglinear" not in n})
    made = adapter_files.make_room(other, tensors(model, prefix))
    assert [(owner, name) for owner, name in made] == [(other.layers[0], "loglinear")]
    assert other.layers[0].loglinear.extra_repr() == model.layers[0].loglinear.extra_repr()
    assert other.layers[0].loglinear.is_identity()
    assert adapter_files.make_room(other, tensors(model, prefix)) == []
    other.load_state_dict(tensors(model), strict=False)
    expected = output(compiled(model))
    assert small.difference(output(compiled(other)), expected) < 1e-6
    assert small.difference(output(compiled(small.Model([small.DeltaMixer()]))), expected) > 1e-3


def test_a_file_of_an_adapter_without_descriptors(fresh_dynamo: None) -> None:
    model, other = converted(), small.Model([small.DeltaMixer()])
    changes = {name: t for name, t in tensors(model).items() if not name.endswith("descriptor")}
    with pytest.raises(CheckpointError, match=r"layers\.0\.loglinear, and DeltaMixer has no 'loglinear'"):
        adapter_files.make_room(other, changes)
    damaged = {n: t + 1 if n.endswith("descriptor") else t for n, t in tensors(model).items()}
    with pytest.raises(CheckpointError, match="layout unknown"):
        adapter_files.make_room(other, damaged)
    assert not any("loglinear" in name for name, _ in other.named_modules())


def test_adapters_are_found_with_no_model_of_peft_around() -> None:
    """Injected ones: the model has the configurations, and its layers say which are in use."""
    model: Any = small.Model([small.DeltaMixer()])
    assert adapters.adapters_of(model) == ({}, [])
    model.peft_config = {"one": SimpleNamespace(), "two": SimpleNamespace()}
    model.layers[0].qkv = Saved(model.layers[0].qkv, "two", "one")
    assert adapters.adapters_of(model) == (model.peft_config, ["two"])


def test_a_wrapper_that_is_asked_after_a_break() -> None:
    """Its children are read where they are: Dynamo cannot run its `__getattr__` in a frame that is resumed."""
    model = converted()
    before = output(compiled(model))
    mixer = model.layers[0]
    mixer.loglinear = Asking(mixer.loglinear, "default")
    mixer.qkv.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    run = compiled(model)
    after = output(run)
    assert (after - before).abs().max() <= 1e-6
    change(mixer.loglinear.modules_to_save["default"])
    assert (output(run) - before).abs().max() > 1e-4
    run(IDS).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in mixer.loglinear.modules_to_save.parameters())
