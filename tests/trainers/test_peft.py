"""PEFT: adapters before and after the conversion, merged, several of them, saved and loaded.

PEFT is not part of the development environment; `test_installed.py` runs this file with it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import llcompile
from llcompile.errors import CheckpointError
from tests.helpers import small
from tests.models import tiny
from tests.trainers.adapted import (
    ALPHA,
    IDS,
    RANK,
    compiled,
    converted,
    moved_by_noise,
    output,
    plain,
    train,
)

peft = pytest.importorskip("peft", reason="PEFT is not installed; tests/trainers/test_installed.py runs this with it")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_dynamo")]

SAVED = {"modules_to_save": ["loglinear"]}
PARAMETER = {"target_parameters": ["loglinear.weight"]}
CLOSE, MOVED = 2e-6, 1e-3


def config(**more: Any) -> Any:
    return peft.LoraConfig(**{"r": RANK, "lora_alpha": ALPHA, "target_modules": ["qkv"], **more})


def lora(model: nn.Module, **more: Any) -> Any:
    return peft.get_peft_model(model, config(**more))


def after_conversion(wrap: str) -> Any:
    """Converted with the adapters there, through the model that PEFT returns or through the base model."""
    if wrap == "injected":
        model: Any = small.model()
        peft.inject_adapter_in_model(config(), model)
        llcompile.convert(model, IDS, verify=False)
        return model
    model = lora(small.model())
    llcompile.convert(model.get_base_model() if wrap == "base" else model, IDS, verify=False)
    return model


def check_elsewhere(folder: Path, base: str) -> None:
    """The adapter of a folder gives the same output on a base model in a process of its own."""
    code = f"""
import sys
import torch
from tests.helpers import small
from tests.trainers.adapted import compiled, converted, moved_by_noise, output
import peft
import llcompile
model = compiled(peft.PeftModel.from_pretrained({base}, sys.argv[1]))
far = small.difference(output(model), torch.load(sys.argv[1] + "/expected.pt"))
assert far < {CLOSE}, far
assert moved_by_noise(model, "loglinear", "default") > {MOVED}
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], env=dict(os.environ), capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("wrap", ["whole", "base", "injected"])
def test_converted_after(wrap: str) -> None:
    """New level weights are enlisted with the adapter: they are trained, and they are among its tensors."""
    model = compiled(after_conversion(wrap))
    assert len(train(model)) == 4
    assert all(
        "modules_to_save.default" in n for n, p in model.named_parameters() if "loglinear" in n and p.requires_grad
    )
    assert small.difference(output(model), output(plain(model))) < CLOSE
    kept = [name for name in peft.get_peft_model_state_dict(model) if "loglinear" in name]
    assert len(kept) == 6
    assert moved_by_noise(compiled(model), "loglinear", "default") > MOVED


def test_a_base_model_without_level_weights(tmp_path: Path) -> None:
    """The file of an adapter has all that is needed to attach them, converted before or after, in any process."""
    model = compiled(after_conversion("whole"))
    train(model)
    model.save_pretrained(str(tmp_path))
    torch.save(output(model), tmp_path / "expected.pt")
    again = peft.PeftModel.from_pretrained(small.model(), str(tmp_path))
    assert small.difference(output(compiled(again)), torch.load(tmp_path / "expected.pt")) < CLOSE
    assert not any(p.requires_grad for p in again.parameters())
    llcompile.convert(again, IDS, verify=False)
    assert small.difference(output(compiled(again)), torch.load(tmp_path / "expected.pt")) < CLOSE
    with again.disable_adapter():
        linear = output(small.model())
        assert small.difference(output(again), linear) < CLOSE
    more = peft.PeftModel.from_pretrained(small.model(), str(tmp_path), is_trainable=True)
    assert len(train(compiled(more), 1)) == 4
    check_elsewhere(tmp_path, base="small.model()")


def test_a_file_that_changes_level_weights_which_are_not_there(tmp_path: Path) -> None:
    lora(converted(), **PARAMETER).save_pretrained(str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(CheckpointError, match=r"layers\.0\.loglinear, and DeltaMixer has no 'loglinear'"):
            peft.PeftModel.from_pretrained(small.model(), str(tmp_path))


def test_transformers_own_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`add_adapter`, `save_pretrained` and `load_adapter` of a model of transformers.

    transformers 5.24 asks for PEFT 0.22, which no registry has yet.
    """
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.18.0")
    ids = tiny.tokens()

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(ids, use_cache=False).logits  # type: ignore[no-any-return]

    model: Any = tiny.build("mamba2")
    plain_logits = logits(model)
    model.add_adapter(peft.LoraConfig(target_modules=["in_proj"]))
    llcompile.convert(model, ids, verify=False, use_cache=False)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and ("loglinear" in name or "lora_B" in name):
                p.normal_(std=0.3)
    expected = logits(compiled(model))
    model.save_pretrained(tmp_path)
    again: Any = tiny.build("mamba2")
    assert torch.equal(logits(again), plain_logits)
    again.load_adapter(str(tmp_path))
    assert small.difference(logits(compiled(again)), expected) < CLOSE
    with torch.no_grad():
        for p in llcompile.level_parameters(again):
            p.normal_()
    assert small.difference(logits(again), expected) > MOVED


class TestTwoAdapters:
    def two(self, base: nn.Module, second: dict[str, Any]) -> Any:
        model = lora(base, **SAVED)
        model.add_adapter("second", config(**second))
        compiled(model)
        train(model)
        model.set_adapter("second")
        train(model, 4)
        return model

    def test_each_with_its_own(self, tmp_path: Path) -> None:
        model = self.two(converted(), SAVED)
        one, other = self.outputs(model)
        assert small.difference(other, one) > MOVED
        assert small.difference(one, output(plain(model, "default"))) < CLOSE
        assert small.difference(other, output(plain(model, "second"))) < CLOSE
        compiled(model)
        for name, unused in (("default", "second"), ("second", "default")):
            model.set_adapter(name)
            assert moved_by_noise(model, "loglinear", name) > MOVED
            assert moved_by_noise(model, "loglinear", unused) == 0
            assert len(list(llcompile.level_parameters(model))) == 4
        with model.disable_adapter():
            assert small.difference(output(model), output(compiled(converted()))) < CLOSE
        model.save_pretrained(str(tmp_path))
        again = peft.PeftModel.from_pretrained(small.model(), str(tmp_path))
        again.load_adapter(str(tmp_path / "second"), "second")
        loaded = self.outputs(compiled(again))
        assert max(map(small.difference, loaded, (one, other))) < CLOSE
        merged = compiled(model.merge_and_unload(adapter_names=["second"]))
        assert small.difference(output(merged), other) < CLOSE

    def outputs(self, model: Any) -> list[torch.Tensor]:
        found = []
        for name in ("default", "second"):
            model.set_adapter(name)
            found.append(output(model))
        return found

    def test_one_without(self) -> None:
        """The adapter that has none uses those of the base model."""
        model = self.two(converted(), {})
        assert small.difference(output(model), output(plain(model, "second"))) < CLOSE
        compiled(model)
        assert moved_by_noise(model, "original_module") > MOVED
        assert moved_by_noise(model, "loglinear", "default") == 0
        own = {id(p) for n, p in model.named_parameters() if "original_module" in n}
        assert {id(p) for p in llcompile.level_parameters(model)} == own


@pytest.mark.parametrize("when", ["after", "before"])
def test_dora(when: str) -> None:
    """Its layers break the graph at each projection: the same output at the start, level weights that act and train."""
    base = converted()
    want = output(compiled(base))
    if when == "after":
        model = lora(base, use_dora=True, **SAVED)
    else:
        model = lora(small.model(), use_dora=True)
        want = output(model)
        report = llcompile.convert(model, IDS, verify=False)
        assert len(report.converted) == 2, str(report)
    model = compiled(model)
    assert small.difference(output(model), want) < CLOSE
    assert moved_by_noise(model, "loglinear", "default") > MOVED
    assert train(model)
