"""Which implementation runs a call, with a stand-in for the C++ engine: what is taken, what is told, what is raised."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from llcompile.errors import CompilerError, KernelCacheError, KernelError, OptionError, StateError
from llcompile.kernels import choice, cpp
from llcompile.kernels.aten import sequence
from llcompile.kernels.aten.token import step as aten_step
from llcompile.kernels.implementations import IMPLEMENTATIONS, preferred
from llcompile.kernels.operands import Operands, Token
from llcompile.kernels.state import empty_state
from llcompile.ops import loglinear_attention, loglinear_attention_step
from tests.kernels.kernel_cases import operands


class Engine(SimpleNamespace):
    """In place of `cpp.engine`: what ATen gives, with a count of calls, or an error."""

    error: Exception | None = None
    calls = 0

    def _run(self, function, arguments):
        self.calls += 1
        if self.error is not None:
            raise self.error
        return function(*arguments)

    def forward(self, *arguments):
        return self._run(sequence.forward, arguments)

    def backward(self, *arguments):
        return self._run(sequence.backward, arguments)

    def step(self, token, routing):
        assert routing is None
        return self._run(aten_step, (token,))


@pytest.fixture(autouse=True)
def engine(monkeypatch):
    """The stand-in, in a process that has refused nothing and told nothing."""
    monkeypatch.delenv(choice.VARIABLE, raising=False)
    monkeypatch.setattr(choice, "_refused", {})
    choice._tell.cache_clear()
    found = Engine()
    monkeypatch.setattr(cpp, "engine", found, raising=False)
    return found


def calls():
    """A forward pass, a backward pass and a step."""
    x = Operands(*operands(20, dtype=torch.float32, delta=True, levels=6).values(), None)
    token = (*(t[:, 0] for t in x[:4]), empty_state(2, 4, 5, 3, 6), x.log_decay[:, 0], None, x.beta[:, 0])
    return {
        "forward": lambda: choice.forward(x, 1.0, False)[0],
        "backward": lambda: choice.backward(x, 1.0, x.v, None)[2],
        "step": lambda: choice.step(Token(*token))[0],
    }


def test_what_auto_takes():
    """C++ on a CPU, Triton on a GPU, ATen on everything else."""
    kinds = {"cpu": "cpp", "cuda": "triton", "mps": "aten", "meta": "aten", "xpu": "aten"}
    assert {kind: preferred(torch.device(kind)).name for kind in kinds} == kinds
    assert choice.CHOICES == ("auto", "cpp", "triton", "aten")


@pytest.mark.parametrize("sweep", ["forward", "backward", "step"])
@pytest.mark.parametrize(("chosen", "ran"), [("auto", 1), ("cpp", 1), ("aten", 0)])
def test_what_is_chosen_runs(engine, monkeypatch, sweep, chosen, ran):
    """By the environment and inside of `use`, which goes first."""
    monkeypatch.setenv(choice.VARIABLE, chosen)
    calls()[sweep]()
    assert engine.calls == ran
    with choice.use("aten"):
        calls()[sweep]()
    assert engine.calls == ran
    monkeypatch.setenv(choice.VARIABLE, "c++")
    with pytest.raises(OptionError, match="auto, cpp, triton, aten"):
        calls()[sweep]()


@pytest.mark.parametrize("sweep", ["forward", "backward", "step"])
def test_a_compiler_that_fails(engine, caplog, sweep):
    """Under auto ATen runs, with one warning; by name it is an error; neither asks the compiler a second time."""
    call = calls()[sweep]
    with choice.use("aten"):
        want = call()
    engine.error = CompilerError("no C++ compiler was found: install one (apt-get install g++)")
    for _ in range(3):
        assert torch.equal(call(), want)
    assert caplog.text.count("the ATen lowering is used instead of C++ kernels") == 1
    assert "apt-get install g++" in caplog.text
    assert engine.calls == 1
    with choice.use("cpp"), pytest.raises(KernelError, match=r"LLCOMPILE_KERNELS=cpp.*apt-get install g\+\+"):
        call()
    assert engine.calls == 1


def test_a_folder_that_cannot_be_written(engine, caplog):
    """It may be mended: the next call tries again."""
    call = calls()["forward"]
    engine.error = KernelCacheError("generated kernels cannot be written to /nowhere")
    call()
    assert "/nowhere" in caplog.text
    with choice.use("cpp"), pytest.raises(KernelCacheError, match="/nowhere"):
        call()
    engine.error = None
    call()
    assert engine.calls == 3


def test_other_errors_are_not_hidden(engine):
    """A call that fails is not run by something else."""
    engine.error = KernelError("out of memory")
    with pytest.raises(KernelError, match=r"^out of memory$"):
        calls()["forward"]()


def test_what_cannot_run_there():
    """C++ on another device, asked for by name."""
    x = Operands(*(None if t is None else t.to("meta") for t in operands(5).values()), None)
    with choice.use("cpp"), pytest.raises(KernelError, match="the operands are on meta; C\\+\\+ kernels run on a CPU"):
        choice.forward(x, 1.0, False)
    assert IMPLEMENTATIONS["cpp"].reason(choice.describe(x, False), torch.device("cpu")) is None


@pytest.mark.parametrize("chosen", ["aten", "auto"])
def test_positions_of_a_step(engine, chosen):
    """Checked before ATen runs, and by the C++ engine itself: here nothing comes between."""
    x = {n: t if t is None else t[:, 0] for n, t in operands(1, levels=4, dtype=torch.float32).items()}
    x.pop("initial_state")
    state = empty_state(2, 4, 5, 3, 4)
    state[:, :, 0] = 0.3
    with choice.use(chosen):
        if chosen == "aten":
            with pytest.raises(StateError, match="lost the position"):
                loglinear_attention_step(**x, state=state)
        else:
            loglinear_attention_step(**x, state=state)
            assert engine.calls == 1


def test_what_is_not_finite_stays_out_of_the_past(engine):
    """In rows and in packed sequences, with one run where all is finite."""
    x = operands(40, "token", False, 9, dtype=torch.float32)
    spoilt = x | {"v": x["v"].clone()}
    spoilt["v"][0, 30:33] = torch.nan
    bounds = torch.tensor([0, 12, 40])
    for where, rows in (({}, slice(None)), ({"cu_seqlens": bounds}, slice(0, 1))):
        clean, wrong = ({n: t if t is None else t[rows] for n, t in y.items()} for y in (x, spoilt))
        engine.calls = 0
        want, _ = loglinear_attention(**clean, **where)
        assert engine.calls == 1
        o, _ = loglinear_attention(**wrong, **where)
        assert engine.calls == 3
        torch.testing.assert_close(o[0, :30], want[0, :30])
        assert o[0, 30].isnan().any()


def test_a_machine_without_a_compiler(tmp_path):
    """The whole way, in a process of its own: the result, and a warning that tells what to install."""
    code = (
        "import torch; from llcompile.ops import loglinear_attention as f; "
        "x = torch.ones(1, 3, 1, 2); print(f(x, x, x, None)[0].sum().item())"
    )
    nowhere = {"PATH": str(tmp_path), "LLCOMPILE_KERNEL_DIR": str(tmp_path / "kernels")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=nowhere)
    assert float(done.stdout) == 24.0
    assert "because no C++ compiler was found: install one" in done.stderr
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**nowhere, choice.VARIABLE: "cpp"}
    )
    assert "KernelError: C++ kernels were requested (LLCOMPILE_KERNELS=cpp), but no C++ compiler" in done.stderr
