"""`llcompile trial`: from a factory and a text file to the files that it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llcompile.commands import cli
from llcompile.commands.trial import Model
from tests.trials.models import WIDTH

MODULE = f"""
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(256, {WIDTH}), nn.Linear({WIDTH}, 256)
        self.qkv = nn.Linear({WIDTH}, 3 * {WIDTH})

    def forward(self, tokens):
        x = self.embed(tokens)
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.head(x + (q @ k.transpose(-1, -2)).tril() @ v / 8)

def model():
    torch.manual_seed(0)
    return Model(), torch.zeros(1, 8, dtype=torch.long)

def loss(model, batch):
    return model(batch.tokens).square().mean()

def bare_model():
    return model()[0]

def number():
    return 3

def batches(split, seed):
    yield torch.zeros(4, 8, dtype=torch.long)

def random_model():
    return Model(), torch.zeros(1, 8, dtype=torch.long)
"""
QUICK = ["--steps", "2", "--seeds", "2", "--batch", "4", "--length", "8", "--held-out", "2", "--inner", "eager"]
QUICK += ["--kinds", "static", "--device", "cpu"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "a_trial_module.py").write_text(MODULE)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 80)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_from_a_text_to_a_verdict(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["trial", "a_trial_module:model", "--data", "text.txt", *QUICK, "--rate", "1e-3,1e-2", "--out", "here"]
    assert cli.main(call) == 0
    said = capsys.readouterr()
    found = json.loads((folder / "here" / "trial.json").read_text())
    assert said.out.startswith(found["verdict"]["decision"].split(":")[0])
    assert [row["arm"] for row in found["arms"]] == [
        "stay at 0.001", "stay at 0.01", "level weights (static)", "all weights (static) at 0.001",
        "all weights (static) at 0.01",
    ]  # fmt: skip
    assert found["held-out length"] == 32
    assert "[10 of 10]" in said.err
    assert (folder / "here" / "trial.html").exists()
    assert cli.main(call) == 0  # and again, from what is there
    again = capsys.readouterr()
    assert "10 are finished" in again.err
    assert again.out.splitlines()[0] == said.out.splitlines()[0]
    assert cli.main([*call, "--level-rate", "1"]) == 2
    assert "holds runs of another trial: level_rate" in capsys.readouterr().err


def test_a_random_model_is_drawn_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["trial", "a_trial_module:random_model", "--data", "text.txt", *QUICK]
    assert cli.main(call) == 0
    assert "all runs start from those of the first one" in capsys.readouterr().err
    torch.manual_seed(1)
    assert cli.main(call) == 0
    assert "6 are finished" in capsys.readouterr().err


def test_a_loss_of_the_users_own(folder: Path) -> None:
    call = ["trial", "a_trial_module:model", "--data", "text.txt", *QUICK, "--loss", "a_trial_module:loss"]
    assert cli.main(call) == 0
    arms = json.loads((folder / "trial-output" / "trial.json").read_text())["arms"]
    assert [row["accuracy"] for row in arms] == [None] * 3


def test_a_bare_model_is_enough(folder: Path) -> None:
    made = Model("a_trial_module:bare_model", (), None)()
    assert torch.equal(made.head.weight, Model("a_trial_module:model", (), None)().head.weight)


def test_a_config_has_no_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"hidden_size": 8, "num_heads": 2, "head_dim": 8, "state_size": 8, "n_groups": 1, "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba2", "vocab_size": 16, **sizes}))
    (tmp_path / "model.safetensors").write_text("")
    for _ in range(2):
        Model(str(tmp_path), (), None)()
    said = " ".join(capsys.readouterr().err.split())
    hint = f"all arms train from scratch; for trained ones, add --checkpoint {tmp_path}/model.safetensors"
    assert said.count(hint) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a_trial_module:model", "--data", "nowhere.txt"], "no such file"),
        (["a_trial_module:nothing", "--data", "text.txt"], "has no 'nothing'"),
        (
            ["a_trial_module:model", "--data", "text.txt", "--checkpoint", "text.txt"],
            "--checkpoint text.txt does not fit",
        ),
        (["a_trial_module:model", "--data", "text.txt", "--length", "999"], "held-out sequences of 3996 need"),
        (["a_trial_module:model", "--data", "text.txt", "--loss", "a_trial_module:nothing"], "--loss a_trial_module:"),
        (
            ["a_trial_module:number", "--data", "text.txt"],
            "a_trial_module:number returned a int; expected an nn.Module",
        ),
        (["a_trial_module:model", "--data", "a_trial_module:batches"], "--batch has no effect on a_trial_module:"),
        (["a_trial_module:model", "--data", "text.txt", "--checkpoint", "."], "--checkpoint .: it is a folder"),
        (["a_trial_module:model", "--data", "."], "--data .: it is a folder"),
        (["a_trial_module:model", "--data", "text.txt", "--seeds", "1"], "expected an integer from 2 to 10000"),
        (["a_trial_module:model", "--data", "text.txt", "--rate", "0"], "is not one or more positive numbers"),
    ],
)
def test_what_is_refused(arguments: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trial", *QUICK, *arguments]) == 2
    assert message in capsys.readouterr().err
