"""Releases: what is tested, what is announced, and that the self-test sees a mixer that does not act."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import llcompile
from llcompile.commands import cli, doctor, self_test
from llcompile.errors import UntestedVersionWarning
from llcompile.integrations import versions

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("version", "numbers"),
    [("2.15.0", (2, 15, 0)), ("2.16", (2, 16, 0)), ("2.15.1.dev3+cu132", (2, 15, 1)), ("5.22.2rc1", (5, 22, 2))],
)
def test_numbers_of_a_version(version: str, numbers: tuple[int, ...]) -> None:
    assert versions.release(version) == numbers


class TestSelfTest:
    @pytest.mark.usefixtures("fresh_dynamo")
    def test_a_family_acts(self) -> None:
        row = next(self_test.families())
        assert row.acts, row

    @pytest.mark.usefixtures("fresh_dynamo")
    def test_a_model_that_never_reaches_the_backend_is_seen(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The control: it is converted, equals its own output, and stays linear."""
        monkeypatch.setattr(nn.Module, "compile", lambda *_, **__: None)
        row = next(self_test.families())
        assert row.acts is False
        assert "they have no effect" in row.detail

    @pytest.mark.usefixtures("fresh_dynamo")
    def test_a_model_without_a_mixer_is_seen(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(self_test, "Loop", lambda *_: nn.Linear(self_test.WIDTH, self_test.WIDTH))
        assert all(row.acts is False and "nothing was found" in row.detail for row in self_test.families())

    def test_a_library_that_breaks_costs_its_rows_only(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(inner: str) -> str:
            raise AttributeError("it was renamed\nand more")

        def absent(inner: str) -> str:
            raise ImportError("it needs a GPU")

        monkeypatch.setattr(self_test, "LIBRARIES", {"json": {"a": broken, "b": absent}, "not_there": {"c": broken}})
        rows = list(self_test.libraries())
        assert [row.acts for row in rows] == [False, None]
        assert rows[0].detail == "AttributeError: it was renamed"

    @pytest.mark.usefixtures("fresh_dynamo")
    def test_code_that_does_not_run_here_is_no_failure(self) -> None:
        def mix(*_: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("0 active drivers")

        row = self_test._row("a library", lambda: self_test._layer(self_test.Calls(mix), self_test.CPU))
        assert row.acts is None
        assert "0 active drivers" in row.detail

    def test_the_random_stream_is_left_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(self_test, "LIBRARIES", {"json": {"a": lambda place: str(torch.rand(1))}})
        before = torch.get_rng_state()
        list(self_test.libraries())
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("acts", "code"), [(True, 0), (None, 0), (False, 1)])
def test_doctors_exit_code_tells(
    acts: bool | None, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "CHECKS", ())
    monkeypatch.setattr(self_test, "every", lambda place: iter([self_test.Outcome("a family", acts, "seen")]))
    assert cli.main(["doctor", "--json"]) == code
    (finding,) = json.loads(capsys.readouterr().out)
    assert (finding["topic"], finding["found"], finding["ok"]) == ("self-test: a family", "seen", acts)


@pytest.fixture
def announced(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The self-tests that an announcement asked for, in a process that has announced nothing."""
    asked: list[str] = []
    monkeypatch.setattr(versions, "self_test", lambda: asked.append("asked") or "six models pass")
    monkeypatch.delenv(versions.VARIABLE, raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    versions.announce.cache_clear()
    yield asked
    versions.announce.cache_clear()


def compile_twice() -> list[str]:
    """What is said about versions while two models are compiled."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            model = self_test.Loop("none", "none")
            llcompile.convert(model, torch.randn(1, 6, 16))
            torch.compile(model, backend="loglinear", options={"inner": "eager"})(torch.randn(1, 6, 16))
    return [str(w.message) for w in caught if issubclass(w.category, UntestedVersionWarning)]


@pytest.mark.usefixtures("fresh_dynamo")
class TestAnnouncement:
    def test_a_newer_release_is_named_once(self, announced: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(versions.TESTED, "torch", ("2.0.0", "2.1.0"))
        (message,) = compile_twice()
        assert f"torch {torch.__version__}" in message
        assert "2.1.0" in message
        assert "six models pass" in message
        assert announced == ["asked"]

    def test_tested_releases_are_not_spoken_of(self, announced: list[str]) -> None:
        assert compile_twice() == []
        assert announced == []

    @pytest.mark.parametrize(("variable", "value"), [(versions.VARIABLE, "0"), ("LOCAL_RANK", "1")])
    def test_it_can_be_switched_off(
        self, variable: str, value: str, announced: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(versions.TESTED, "torch", ("2.0.0", "2.1.0"))
        monkeypatch.setenv(variable, value)
        versions.announce()
        assert announced == []


class TestOtherProcess:
    """The sentence that an announcement ends with, from what the other process prints."""

    def said(self, monkeypatch: pytest.MonkeyPatch, stdout: str) -> str:
        monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=stdout))
        return versions.self_test()

    def test_rows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        rows = [("torch", False), ("self-test: DeltaNet", True), ("self-test: fla: gla", False), ("self-test: x", None)]
        printed = json.dumps([{"topic": topic, "ok": ok, "found": "declined"} for topic, ok in rows])
        assert self.said(monkeypatch, f"noise\n{printed}") == "1 models pass, these fail: fla: gla (declined)"

    def test_nothing_printed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.said(monkeypatch, "") == "it could not be run"

    def test_too_slow(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def slow(*_: object, **__: object) -> None:
            raise subprocess.TimeoutExpired("doctor", 1)

        monkeypatch.setattr(subprocess, "run", slow)
        assert "did not finish" in versions.self_test()


def test_other_keywords_of_torch_compile_are_taken() -> None:
    """torch 2.15 hands `name` to every backend."""
    from llcompile.backend import loglinear

    def run(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    compiled = torch._dynamo.optimize(lambda m, i: loglinear(m, i, options={"inner": "eager"}, name="step"))(run)
    assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 2.0))


def test_bounds_of_the_package_are_those_that_were_tested() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    for name in ("torch", "transformers"):
        oldest = ".".join(versions.TESTED[name][0].split(".")[:2])
        assert f'"{name}>={oldest}"' in project


def test_python_m_llcompile() -> None:
    done = subprocess.run([sys.executable, "-m", "llcompile", "--version"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert llcompile.__version__ in done.stdout
