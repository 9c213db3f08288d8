"""Training level weights: which parameters they are, freezing the rest, groups for an optimizer, files of their own."""

from __future__ import annotations

import copy
import runpy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

import llcompile
from llcompile.errors import CheckpointError, LevelWeightsError, ModelError, OptimizerWarning
from llcompile.weights import attachment
from llcompile.weights.level_weights import LevelWeights
from tests.helpers import small
from tests.helpers.small import difference

ROOT = Path(__file__).parent.parent
CALLS: list[Callable[[Any], Any]] = [
    llcompile.level_parameters,
    llcompile.freeze_except_levels,
    lambda model: llcompile.parameter_groups(model, lr=1e-3),
    lambda model: llcompile.save_levels(model, "never.safetensors"),
    lambda model: llcompile.load_levels(model, "never.safetensors"),
]


def with_levels(kind: str = "linear", levels: int = 5, seed: int = 0, **sizes: Any) -> small.Model:
    """A model with level weights that a conversion would give it, without one."""
    model = small.model(seed, **sizes)
    for layer in model.layers:
        width = layer.qkv.in_features
        weights = LevelWeights(kind, layer.heads, levels, None if kind == "static" else width)
        attachment.attach(layer, "loglinear", weights)
    return model


class TestParameters:
    def test_they_are_those_of_the_level_weights(self) -> None:
        model = with_levels()
        named = {name for name, p in model.named_parameters() if any(p is q for q in llcompile.level_parameters(model))}
        assert named == {name for name, _ in model.named_parameters() if ".loglinear." in name}
        assert len(named) == 4

    def test_what_is_shared_comes_once(self) -> None:
        model = with_levels()
        model.layers.append(model.layers[0])
        assert len(list(llcompile.level_parameters(model))) == 4

    def test_freezing_and_its_count(self) -> None:
        model = with_levels()
        levels = [p for name, p in model.named_parameters() if ".loglinear." in name]
        levels[0].requires_grad_(False)
        trained = llcompile.freeze_except_levels(model)
        assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in levels}
        count, total = sum(p.numel() for p in levels), sum(p.numel() for p in model.parameters())
        assert (trained.trained, trained.total, trained.share) == (count, total, count / total)
        assert str(trained) == f"trains {100 * count / total:.2g} % of the parameters ({count:,} of {total:,})"

    def test_groups(self) -> None:
        model = with_levels()
        model.layers[0].gates.weight._no_weight_decay = True  # type: ignore[attr-defined]
        model.embed.weight.requires_grad_(False)
        groups = llcompile.parameter_groups(model, lr=1e-3, weight_decay=0.1)
        decayed, kept, levels = groups
        assert [(g["name"], g["lr"], g["weight_decay"]) for g in groups] == [
            ("decayed", 1e-3, 0.1),
            ("not decayed", 1e-3, 0.0),
            ("level weights", 1e-2, 0.0),
        ]
        assert {id(p) for p in levels["params"]} == {id(p) for p in llcompile.level_parameters(model)}
        assert all(p.dim() > 1 for p in decayed["params"])
        assert any(p is model.layers[0].gates.weight for p in kept["params"])
        every = [id(p) for g in groups for p in g["params"]]
        assert sorted(every) == sorted(id(p) for p in model.parameters() if p.requires_grad)
        optimizer = torch.optim.AdamW(groups)
        assert [g["lr"] for g in optimizer.param_groups] == [1e-3, 1e-3, 1e-2]
        own = llcompile.parameter_groups(model, lr=1e-3, level_lr=5e-2, level_weight_decay=0.3)[-1]
        assert (own["lr"], own["weight_decay"]) == (5e-2, 0.3)

    def test_frozen_models_have_one_group(self) -> None:
        model = with_levels()
        llcompile.freeze_except_levels(model)
        assert [g["name"] for g in llcompile.parameter_groups(model, lr=1.0)] == ["level weights"]

    def test_an_optimizer_of_the_groups_misses_nothing(self) -> None:
        model = with_levels()
        optimizer = torch.optim.SGD(llcompile.parameter_groups(model, lr=1e-3))
        model(small.ids()).sum().backward()
        with warnings.catch_warnings():
            warnings.simplefilter("error", OptimizerWarning)
            optimizer.step()

    @pytest.mark.parametrize("call", CALLS)
    def test_what_is_no_model(self, call: Callable[[Any], Any]) -> None:
        with pytest.raises(ModelError, match=r"nn\.Module, got dict"):
            call({})

    @pytest.mark.parametrize("call", CALLS[1:4])
    def test_a_model_without_level_weights(self, call: Callable[[Any], Any]) -> None:
        model = small.model()
        with pytest.raises(LevelWeightsError, match="Model has no level weights"):
            call(model)
        assert all(p.requires_grad for p in model.parameters())
        assert list(llcompile.level_parameters(model)) == []


class Outer(nn.Module):
    """As a wrapper (PEFT, torch.compile) holds a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"model": model})


class TestFiles:
    @pytest.fixture(params=["linear", "static", "routed"])
    def saved(self, request: Any, tmp_path: Path) -> tuple[small.Model, Path]:
        model, path = with_levels(request.param), tmp_path / "levels.safetensors"
        small.perturb(model)
        assert llcompile.save_levels(model, path) == 2
        return model, path

    def check_same(self, one: nn.Module, other: nn.Module) -> None:
        held, found = ({n: t for n, t in m.state_dict().items() if "loglinear" in n} for m in (one, other))
        assert {n.partition("layers")[2] for n in held} == {n.partition("layers")[2] for n in found}
        for (_, value), (_, loaded) in zip(sorted(held.items()), sorted(found.items()), strict=True):
            assert torch.equal(value, loaded)

    def test_into_a_model_that_is_not_converted(self, saved: tuple[small.Model, Path]) -> None:
        model, path = saved
        other = small.model(seed=1)
        before = {name: p.clone() for name, p in other.named_parameters()}
        assert llcompile.load_levels(other, path) == 2
        self.check_same(model, other)
        assert all(torch.equal(dict(other.named_parameters())[name], value) for name, value in before.items())
        assert len(list(llcompile.level_parameters(other))) == len(list(llcompile.level_parameters(model)))

    def test_into_a_model_that_is_converted(self, saved: tuple[small.Model, Path]) -> None:
        model, path = saved
        other = with_levels(model.layers[0].loglinear.kind, seed=1)
        own = list(llcompile.level_parameters(other))
        llcompile.load_levels(other, path)
        self.check_same(model, other)
        assert all(p is q for p, q in zip(own, llcompile.level_parameters(other), strict=True))

    def test_wrapped_models(self, saved: tuple[small.Model, Path], tmp_path: Path) -> None:
        model, path = saved
        outer = Outer(small.model())
        llcompile.load_levels(outer, path)
        self.check_same(model, outer)
        llcompile.save_levels(outer, tmp_path / "outer.safetensors")
        again = small.model()
        llcompile.load_levels(again, tmp_path / "outer.safetensors")
        self.check_same(model, again)

    @pytest.mark.parametrize("regional", [False, True])
    def test_compiled_models(self, saved: tuple[small.Model, Path], tmp_path: Path, regional: bool) -> None:
        """Files have the names of the model inside, whichever is saved or loaded."""

        def compiled(model: small.Model) -> nn.Module:
            if not regional:
                return cast(nn.Module, torch.compile(model, backend="loglinear"))
            for number, layer in enumerate(model.layers):
                model.layers[number] = torch.compile(layer, backend="loglinear")
            return model

        model, path = saved
        assert llcompile.save_levels(compiled(copy.deepcopy(model)), tmp_path / "compiled.safetensors") == 2
        assert (tmp_path / "compiled.safetensors").read_bytes() == path.read_bytes()
        other = compiled(small.model())
        assert llcompile.load_levels(other, path) == 2
        for mine, theirs in zip(llcompile.level_parameters(model), llcompile.level_parameters(other), strict=True):
            assert torch.equal(mine, theirs)

    def test_files_are_small(self, tmp_path: Path) -> None:
        model, path = with_levels(width=256), tmp_path / "levels.safetensors"
        llcompile.save_levels(model, path)
        own = sum(p.numel() for p in llcompile.level_parameters(model))
        assert path.stat().st_size < 4 * own + 4096

    def check_refused(self, model: nn.Module, path: Path, message: str) -> None:
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(CheckpointError, match=message):
            llcompile.load_levels(model, path)
        after = model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(value, after[name]) for name, value in before.items())

    def test_what_does_not_fit(self, tmp_path: Path) -> None:
        path = tmp_path / "levels.safetensors"
        llcompile.save_levels(with_levels(), path)
        shorter = small.Model([small.DeltaMixer()])
        self.check_refused(shorter, path, r"Model has no module 'layers\.1'")
        self.check_refused(
            with_levels("static"), path, "file's level weights are kind='linear'.*model's are kind='static'"
        )
        self.check_refused(with_levels(levels=6), path, "levels=5.*levels=6")
        more = with_levels()
        more.layers.append(small.DeltaMixer())
        attachment.attach(more.layers[2], "loglinear", LevelWeights("static", 2, 5))
        self.check_refused(more, path, r"no level weights for layers\.2\.loglinear")

    def test_files_that_are_none(self, tmp_path: Path) -> None:
        from safetensors.torch import load_file, save_file

        text = tmp_path / "text.safetensors"
        text.write_text("no tensors")
        self.check_refused(small.model(), text, "cannot be read")
        llcompile.save(small.model(), tmp_path / "plain.safetensors")
        self.check_refused(small.model(), tmp_path / "plain.safetensors", "has no section 'loglinear'")
        whole = tmp_path / "whole.safetensors"
        llcompile.save_levels(with_levels(), whole)
        from safetensors import safe_open

        with safe_open(str(whole), framework="pt") as file:
            metadata = file.metadata()
        tensors = load_file(whole)
        del tensors["layers.1.loglinear.bias"]
        save_file(tensors, whole, metadata=metadata)
        self.check_refused(small.model(), whole, r"layers\.1\.loglinear: bias is missing")

    def test_a_missing_file_is_the_systems_error(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            llcompile.load_levels(small.model(), tmp_path / "none.safetensors")

    def test_files_of_save_have_level_weights_too(self, tmp_path: Path) -> None:
        model, path = with_levels(), tmp_path / "whole.safetensors"
        small.perturb(model)
        llcompile.save(model, path)
        other = small.model(seed=1)
        llcompile.load_levels(other, path)
        self.check_same(model, other)
        assert difference(other.head.weight, model.head.weight) > 0.1


def example(name: str, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    main: Any = runpy.run_path(str(ROOT / "examples" / name))["main"]
    main(["--inner", "eager", "--steps", "3", "--length", "24", *arguments])
    return capsys.readouterr().out


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("kind", ["linear", pytest.param("routed", marks=pytest.mark.slow)])
def test_the_example_in_plain_torch(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = example("finetune.py", capsys, "--level-weights", kind, "--level-lr", "3e-2")
    assert "2 of 2 linear-time mixers are log-linear" in said
    assert "% of the parameters" in said
    before, after = said.partition("moved the held-out loss from ")[2].splitlines()[0].split(" to ")
    assert float(after) != float(before)
    assert f"loaded into a fresh model: held-out loss {after}" in said


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("everything", [False, True])
def test_the_example_with_the_trainer(everything: bool, capsys: pytest.CaptureFixture[str]) -> None:
    said = example("finetune_trainer.py", capsys, *["--all"] * everything)
    assert ("and nothing else, moved: 4 of 4 of their tensors, 0 others" in said) != everything
    assert "4 of 4 of their tensors" in said
    assert "opened again with from_pretrained: the same logits" in said
