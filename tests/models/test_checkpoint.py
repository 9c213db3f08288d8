"""A converted model of transformers, saved and opened again: the same model, level weights included."""

from __future__ import annotations

import copy
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Mamba2ForCausalLM, PreTrainedModel

import llcompile
from llcompile.errors import CheckpointError
from llcompile.weights import checkpoint
from tests.models.tiny import build

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

IDS = torch.arange(40).reshape(2, 20)


def levels(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if ".loglinear" in name}


def compiled(model: nn.Module) -> Tensor:
    with torch.no_grad():
        run = torch.compile(model, backend="loglinear", options={"inner": "eager"})
        return run(IDS, use_cache=False)[0]  # type: ignore[no-any-return]


@functools.cache
def converted() -> PreTrainedModel:
    """Converted, with level weights that are no longer 1: once, as tracing takes most of the time."""
    model = build("mamba2")
    llcompile.convert(model, IDS, use_cache=False, verify=False)
    for p in levels(model).values():
        nn.init.normal_(p)
    return model


@pytest.fixture
def trained() -> PreTrainedModel:
    """A copy for each test."""
    return copy.deepcopy(converted())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opened_as_it_was_saved(trained: PreTrainedModel, dtype: torch.dtype, tmp_path: Path) -> None:
    trained.to(dtype).save_pretrained(tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert {p.dtype for p in levels(opened).values()} == {dtype}
    torch.testing.assert_close(dict(opened.state_dict()), dict(trained.state_dict()), rtol=0, atol=0)
    torch.testing.assert_close(compiled(opened), compiled(trained), rtol=0, atol=0)
    kept = compiled(opened)
    with torch.no_grad():
        for p in levels(opened).values():
            p.zero_()
    assert (compiled(opened) - kept).abs().max() > 1e-2  # they act


def test_several_files(trained: PreTrainedModel, tmp_path: Path) -> None:
    """With an index: by transformers, by llcompile, and into a model on meta."""
    trained.save_pretrained(tmp_path, max_shard_size="20KB")
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    expected = dict(trained.state_dict())
    for options in ({"device_map": "cpu"}, {"low_cpu_mem_usage": True}):
        opened = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
        torch.testing.assert_close(dict(opened.state_dict()), expected, rtol=0, atol=0)
    plain, adapted = build("mamba2"), build("mamba2")
    assert llcompile.load(plain, tmp_path) == 2
    torch.testing.assert_close(dict(plain.state_dict()), expected, rtol=0, atol=0)
    assert llcompile.load_levels(adapted, tmp_path) == 2
    torch.testing.assert_close(levels(adapted), levels(trained), rtol=0, atol=0)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    empty.load_state_dict({n: t for file in files for n, t in load_file(file).items()}, strict=False, assign=True)
    empty.tie_weights()
    torch.testing.assert_close(dict(empty.state_dict()), expected, rtol=0, atol=0)


def test_without_the_head(trained: PreTrainedModel, tmp_path: Path) -> None:
    trained.save_pretrained(tmp_path)
    opened = AutoModel.from_pretrained(tmp_path)  # names without the prefix "backbone."
    assert len(levels(opened)) == len(levels(trained)) > 0
    torch.testing.assert_close(compiled(opened), compiled(trained.backbone), rtol=0, atol=0)


def test_converted_again_and_reverted(trained: PreTrainedModel, tmp_path: Path) -> None:
    trained.save_pretrained(tmp_path / "one")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    want = compiled(opened)
    report = llcompile.convert(opened, IDS, use_cache=False, verify=False)
    assert len(report.converted) == 2, str(report)
    torch.testing.assert_close(compiled(opened), want, rtol=0, atol=0)

    llcompile.revert(opened)
    opened.save_pretrained(tmp_path / "two")
    assert "loglinear" not in (tmp_path / "two" / "config.json").read_text()
    assert not levels(AutoModelForCausalLM.from_pretrained(tmp_path / "two"))


def test_level_weights_that_the_files_lack_are_one(trained: PreTrainedModel, tmp_path: Path) -> None:
    trained.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    stored = load_file(path)
    save_file({n: t for n, t in stored.items() if ".loglinear" not in n}, path, metadata={"format": "pt"})
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    held = [m for m in opened.modules() if isinstance(m, llcompile.LevelWeights)]
    assert len(held) == 2
    assert all(weights.is_identity() for weights in held)
    opened.load_state_dict(stored, strict=False)  # the whole file, in torch's own way
    assert not any(weights.is_identity() for weights in held)
    torch.testing.assert_close(levels(opened), levels(trained), rtol=0, atol=0)


@pytest.mark.parametrize("use", ["convert", "compile", "inspect"])
def test_left_out_when_it_was_opened(trained: PreTrainedModel, use: str, tmp_path: Path) -> None:
    """As by a process that imports llcompile after `from_pretrained`."""
    opened = Mamba2ForCausalLM(trained.config)
    opened.config.loglinear = checkpoint.section(trained)
    if use == "convert":
        with pytest.raises(CheckpointError, match="checkpoint with the level weights of 2 mixers"):
            llcompile.convert(opened, IDS, use_cache=False)
    elif use == "inspect":
        report = str(llcompile.inspect(opened, IDS, use_cache=False))
        assert "checkpoint with the level weights of 2 mixers" in report
        assert "checkpoint" not in str(llcompile.inspect(trained, IDS, use_cache=False))
    else:
        with pytest.raises(Exception, match="checkpoint with the level weights of 2 mixers"):
            compiled(opened)
    llcompile.revert(opened)
    assert len(llcompile.convert(opened, IDS, use_cache=False, verify=False).converted) == 2
    opened.save_pretrained(tmp_path)  # the converted model itself, and no copy
    assert levels(AutoModelForCausalLM.from_pretrained(tmp_path)).keys() == levels(opened).keys()


def test_a_section_of_a_later_version(trained: PreTrainedModel, tmp_path: Path) -> None:
    trained.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["loglinear"]["version"] = 7
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="has layout 7"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("imports", ["llcompile, transformers", "transformers, llcompile", "transformers"])
def test_in_another_process(trained: PreTrainedModel, imports: str, tmp_path: Path) -> None:
    """In any order of imports; and without one where `import torch` loads the entry point of llcompile."""
    trained.save_pretrained(tmp_path)
    program = f"""
import sys
from transformers import pipeline
import {imports}
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(sum(float(p.detach().double().square().sum()) for n, p in model.named_parameters() if ".loglinear" in n))
"""
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": str(root)}
    ran = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, env=env, check=True)
    want = sum(float(p.detach().double().square().sum()) for p in levels(trained).values())
    assert float(ran.stdout) == pytest.approx(want, rel=1e-12)
