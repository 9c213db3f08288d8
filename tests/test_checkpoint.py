"""Checkpoints of models of the user's own."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import llcompile
from llcompile.errors import CheckpointError, ModelError, OutputError
from llcompile.weights import checkpoint
from tests.helpers.small import Model, TwoMixers
from tests.helpers.trained import IDS, compiled, converted, levels

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


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


def test_a_compiled_model_is_saved_as_the_model_in_it(tmp_path: Path) -> None:
    model, again = converted(Model()), Model()
    llcompile.save(torch.compile(model, backend="loglinear"), tmp_path / "model.safetensors")
    assert llcompile.load(again, tmp_path / "model.safetensors") == 2
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))
    llcompile.save(model, tmp_path / "plain.safetensors")
    assert (tmp_path / "plain.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    assert llcompile.load(torch.compile(again, backend="loglinear"), tmp_path / "plain.safetensors") == 0


def test_level_weights_of_another_kind(tmp_path: Path) -> None:
    llcompile.save(converted(Model()), tmp_path / "model.safetensors")
    other = Model()
    llcompile.convert(other, IDS, options={"level_weights": "static"}, verify=False)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(CheckpointError, match="of kind 'linear', those of the model of kind 'static'"):
        llcompile.load(other, tmp_path / "model.safetensors")
    assert all(torch.equal(x, before[name]) for name, x in other.state_dict().items())
    llcompile.revert(other)
    assert llcompile.load(other, tmp_path / "model.safetensors") == 2


@pytest.mark.parametrize("regional", ["saved", "loaded", "both"])
def test_regional_compilation_has_no_part_in_names(regional: str, tmp_path: Path) -> None:
    """Blocks compiled one by one, as accelerate does it, are saved and loaded as the blocks in them."""
    model, other = converted(Model()), Model()
    want, linear = compiled(model), model(IDS)
    for one, when in ((model, "saved"), (other, "loaded")):
        if regional in (when, "both"):
            for i, layer in enumerate(one.layers):
                one.layers[i] = torch.compile(layer, backend="loglinear", options={"inner": "eager"})
    llcompile.save(model, tmp_path / "model.safetensors")
    assert llcompile.load(other, tmp_path / "model.safetensors") == 2
    found = other(IDS) if regional != "saved" else compiled(other)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)
    assert (found - linear).abs().max() > 1e-2


@pytest.mark.parametrize("save", [llcompile.save, llcompile.save_levels])
def test_a_file_that_cannot_be_written(save: Callable[[nn.Module, Path], object], tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"the folder .*nowhere does not exist"):
        save(converted(Model()), tmp_path / "nowhere" / "model.safetensors")


@pytest.mark.parametrize("section", ["junk", [1], {"version": 1, "mixers": 3}, {"mixers": {}}])
def test_a_section_that_is_damaged(section: Any) -> None:
    with pytest.raises(CheckpointError, match="'loglinear' is damaged"):
        checkpoint.restore(Model(), section)
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.restore(Model(), {"version": 1, "mixers": {"layers.0.loglinear": section}})


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
    from torch.distributed import checkpoint as distributed
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model, other = converted(Model()), converted(Model())
    optimizer, fresh = (torch.optim.AdamW(m.parameters(), 1e-2) for m in (model, other))
    compiled(model).square().mean().backward()
    optimizer.step()
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    distributed.save(state, checkpoint_id=tmp_path)
    read = dict(zip(("model", "optimizer"), get_state_dict(other, fresh), strict=True))
    distributed.load(read, checkpoint_id=tmp_path)
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


@functools.cache
def kept() -> nn.Module:
    """Converted once, for tests that only read it."""
    return converted(Model())


def in_parts(model: nn.Module, folder: Path) -> Path:
    """As `save_pretrained` writes it: two files, an index, and what level weights there are in config.json."""
    state = list(model.state_dict().items())
    parts = {"part-1.safetensors": dict(state[::2]), "part-2.safetensors": dict(state[1::2])}
    for file, tensors in parts.items():
        save_file(tensors, folder / file)
    weight_map = {name: file for file, tensors in parts.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"loglinear": checkpoint.section(model)}))
    return folder


@pytest.mark.parametrize("named", ["", "model.safetensors.index.json"], ids=["folder", "index"])
def test_several_files(named: str, tmp_path: Path) -> None:
    model = kept()
    path = in_parts(model, tmp_path) / named
    whole, adapted = Model(), Model()
    own = adapted.head.weight.detach().clone()
    assert llcompile.load(whole, path) == 2
    torch.testing.assert_close(dict(whole.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
    assert llcompile.load_levels(adapted, path) == 2
    torch.testing.assert_close(levels(adapted), levels(model), rtol=0, atol=0)
    torch.testing.assert_close(adapted.head.weight, own, rtol=0, atol=0)
    with torch.device("meta"):
        empty = Model()
    assert llcompile.load_levels(empty, path) == 2
    assert not empty.load_state_dict(model.state_dict(), assign=True).missing_keys
    torch.testing.assert_close(dict(empty.state_dict()), dict(model.state_dict()), rtol=0, atol=0)


def without_index(folder: Path) -> Path:
    (folder / "model.safetensors.index.json").unlink()
    return folder


def index_of_nothing(folder: Path) -> Path:
    (folder / "model.safetensors.index.json").write_text("{}")
    return folder


def a_part_is_cut(folder: Path) -> Path:
    (folder / "part-2.safetensors").write_bytes((folder / "part-2.safetensors").read_bytes()[:-8])
    return folder


def a_tensor_is_missing(folder: Path) -> Path:
    tensors = load_file(folder / "part-1.safetensors")
    tensors.pop("embed.weight")
    save_file(tensors, folder / "part-1.safetensors")
    return folder


def one_too_many(folder: Path) -> Path:
    save_file({**load_file(folder / "part-1.safetensors"), "extra": torch.ones(1)}, folder / "part-1.safetensors")
    return folder / "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (without_index, "has 2 safetensors files and no single index"),
        (index_of_nothing, "no weight_map"),
        (a_part_is_cut, r"part-2\.safetensors cannot be read"),
        (a_tensor_is_missing, r"does not fit Model: it lacks embed\.weight"),
        (one_too_many, "does not fit Model: it has, and the model has not, extra"),
    ],
)
def test_several_files_that_cannot_be_loaded(damage: Callable[[Path], Path], said: str, tmp_path: Path) -> None:
    path = damage(in_parts(kept(), tmp_path))
    other = Model()
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(CheckpointError, match=said):
        llcompile.load(other, path)
    torch.testing.assert_close(dict(other.state_dict()), dict(before), rtol=0, atol=0)


def test_shared_tensors(tmp_path: Path) -> None:
    """They are written once, and one of their names is enough; without it the file does not fit."""
    model = Model()
    model.head.weight = model.embed.weight
    converted(model)
    llcompile.save(model, tmp_path / "model.safetensors")
    tied, untied = Model(), Model()
    tied.head.weight = tied.embed.weight
    assert llcompile.load(tied, tmp_path / "model.safetensors") == 2
    torch.testing.assert_close(tied.head.weight, model.head.weight, rtol=0, atol=0)
    with pytest.raises(CheckpointError, match=r"does not fit Model: it lacks (head|embed)\.weight"):
        llcompile.load(untied, tmp_path / "model.safetensors")
    assert not levels(untied)
