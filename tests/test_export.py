"""torch.export of a converted model: the program has our operators and computes what the compiled model does."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import Mamba2Config, Mamba2ForCausalLM

import llcompile
from llcompile.errors import LevelWeightsIgnoredWarning, MissedLevelWeightsError
from llcompile.kernels import choice
from tests.helpers import small

ROOT = Path(__file__).resolve().parent.parent
LENGTH = torch.export.Dim("length", min=2, max=4096)


def converted(model: nn.Module, x: Tensor) -> nn.Module:
    llcompile.convert(model.eval(), x, verify=False)
    small.perturb(model)
    return model


def operators(program: torch.export.ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if "llcompile" in str(node.target)]


def run_compiled(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.compile(model, backend="loglinear", options={"inner": "eager"})(x)


LOADED = """
import sys, torch
import llcompile
program = torch.export.load(sys.argv[1])
x, expected = torch.load(sys.argv[2])
print(float((program.module()(x) - expected).abs().max() / expected.abs().max()))
"""


@pytest.mark.parametrize("autoload", ["1", pytest.param("0", marks=pytest.mark.slow)])
def test_saved_loaded_elsewhere_and_run(tmp_path: Path, autoload: str) -> None:
    """Gated delta rule; another length than that of the export."""
    model, x, longer = converted(small.model(), small.ids()), small.ids(), small.ids(length=77)
    program = torch.export.export(model, (x,), dynamic_shapes={"ids": {1: LENGTH}})
    assert operators(program) == ["llcompile.loglinear_attention.default"] * 2
    torch.export.save(program, tmp_path / "program.pt2")
    torch.save((longer, run_compiled(model, longer)), tmp_path / "expected.pt")
    done = subprocess.run(
        [sys.executable, "-c", LOADED, tmp_path / "program.pt2", tmp_path / "expected.pt"],
        cwd=ROOT,
        env={**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": autoload},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["cpp", "aten"])
def test_a_package_of_aotinductor(tmp_path: Path, kernels: str) -> None:
    """The package calls the operator, whichever form runs it, at other lengths than that of the export."""
    model, x, longer = converted(small.model(), small.ids()), small.ids(), small.ids(length=77)
    program = torch.export.export(model, (x,), dynamic_shapes={"ids": {1: LENGTH}})
    with torch.no_grad():
        file = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        package = torch._inductor.aoti_load_package(file)
    for ids in (x, longer):
        with torch.no_grad():
            assert small.difference(model(ids), run_compiled(model, ids)) > 1e-3  # level weights act
            with choice.use(kernels):
                assert small.difference(package(ids), run_compiled(model, ids)) < 1e-5


@pytest.mark.parametrize("dynamic", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_model_of_transformers(dynamic: bool) -> None:
    sizes = {"vocab_size": 32, "hidden_size": 32, "num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1}
    model = Mamba2ForCausalLM(Mamba2Config(num_hidden_layers=2, use_cache=False, chunk_size=16, **sizes))
    x, y = small.ids(), small.ids(length=50)
    converted(model, x)
    program = torch.export.export(
        model, (), {"input_ids": x}, dynamic_shapes={"input_ids": {1: LENGTH}} if dynamic else None
    )
    assert operators(program) == ["llcompile.loglinear_attention.default"] * 2
    for ids in (x, y) if dynamic else (x,):
        expected = torch.compile(model, backend="loglinear", options={"inner": "eager"})(ids).logits
        assert small.difference(program.module()(input_ids=ids).logits, expected) < 1e-5


class Quadratic(nn.Module):
    """Scores for all pairs, with a decay of each head that is a parameter or a buffer."""

    def __init__(self, learned: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        decay = torch.tensor([0.8, 0.9])
        if learned:
            self.decay = nn.Parameter(decay)
        else:
            self.register_buffer("decay", decay)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        t = torch.arange(x.shape[1])
        decays = self.decay[:, None, None] ** (t[:, None] - t[None]).clamp(min=0)
        return ((q @ k.transpose(-1, -2) * decays).tril() @ v).transpose(1, 2).flatten(2)


@pytest.mark.slow
@pytest.mark.parametrize("learned", [False, True], ids=["buffer", "parameter"])
def test_code_that_was_recognised(learned: bool) -> None:
    """Its numbers decide whether it is a mixer, and torch.export hides them behind fake tensors."""
    x = torch.randn(1, 24, 16)
    model = converted(Quadratic(learned), x)
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {1: LENGTH}})
    assert operators(program) == ["llcompile.loglinear_attention.default"]
    y = torch.randn(1, 90, 16)
    assert small.difference(program.module()(y), run_compiled(model, y)) < 1e-5


@pytest.mark.slow
def test_a_compiled_model_and_a_part_of_a_larger_one() -> None:
    x = small.ids()
    model = converted(small.model(), x)
    expected = run_compiled(model, x)
    whole = torch.export.export(nn.Sequential(model, nn.Softmax(-1)), (x,))
    assert small.difference(whole.module()(x), expected.softmax(-1)) < 1e-5
    model.compile(backend="loglinear", options={"inner": "eager"})
    program = torch.export.export(model, (x,))
    assert len(operators(program)) == 2
    assert small.difference(program.module()(x), expected) < 1e-5


@pytest.mark.slow
def test_a_copy() -> None:
    x = small.ids()
    model = copy.deepcopy(converted(small.model(), x))
    program = torch.export.export(model, (x,))
    assert small.difference(program.module()(x), run_compiled(model, x)) < 1e-5


@pytest.mark.slow
def test_strict_is_not_rewritten_and_says_so() -> None:
    x = small.ids()
    with pytest.warns(LevelWeightsIgnoredWarning, match="another backend"):
        assert not operators(torch.export.export(converted(small.model(), x), (x,), strict=True))


@pytest.mark.slow
def test_a_reverted_model_is_what_it_was() -> None:
    x = small.ids()
    model = converted(small.model(), x)
    llcompile.revert(model)
    assert not operators(torch.export.export(model, (x,)))


class Softened(nn.Module):
    """Linear attention until `soft` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.soft = nn.Linear(8, 24), False

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = (q @ k.mT).tril()
        return (scores.softmax(-1) if self.soft else scores) @ v


@pytest.mark.parametrize("root", [True, False])
def test_level_weights_that_the_program_would_not_read(root: bool) -> None:
    """Whatever their value is: an error, as in a compiled call."""
    mixer, x = Softened(), torch.randn(2, 12, 8)
    model = mixer if root else nn.Sequential(nn.Identity(), mixer)
    llcompile.convert(model.eval(), x, verify=False)
    assert operators(torch.export.export(model, (x,)))  # the control
    mixer.soft = True
    with pytest.raises(MissedLevelWeightsError, match="does not read them: not causal"):
        torch.export.export(model, (x,))
