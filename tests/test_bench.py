"""The measurements of hand-written mixers: the workers run, the figures add up, mistakes are one line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import first_step, recognition, rewrite
from benchmarks.mixers import Quadratic, TokenLoop
from benchmarks.process import in_process
from llcompile.commands import cli

REWRITE = {"decay": "scalar", "heads": 1, "dim": 8, "repeats": 1, "threads": 1, "length": 96}
RECOGNITION = {"form": "loglinear", "threads": 1, "config": None}


def run(*jobs: dict[str, Any]) -> list[dict[str, Any]]:
    return in_process("benchmarks.rewrite_worker", list(jobs), 300, "late")


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, Any]]:
    """Four jobs in one process; the last one fails."""
    jobs = {"as written": {**REWRITE, "form": "eager", "backward": True}}
    jobs |= {model: {**RECOGNITION, "model": model, "length": 12} for model in recognition.OWN}
    jobs["fails"] = {**REWRITE, "form": "nonsense", "backward": True}
    return dict(zip(jobs, run(*jobs.values()), strict=True))


def test_the_two_mixers_agree() -> None:
    quadratic, loop = Quadratic(12, 3, decay=True).double(), TokenLoop(12, 3).double()
    loop.load_state_dict(quadratic.state_dict())
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    torch.testing.assert_close(loop(x) * 4**-0.5, quadratic(x))


def test_as_written(measured: dict[str, dict[str, Any]]) -> None:
    found = measured["as written"]
    assert found["seconds"] > 0
    assert "recognition_seconds" not in found


@pytest.mark.slow
def test_rewritten() -> None:
    (found,) = run({**REWRITE, "form": "loglinear", "backward": True})
    assert found["seconds"] > 0
    assert 0 < found["recognition_seconds"] < found["compile_seconds"]
    assert found["proof_error"] < 1e-4


def test_what_fails_says_why(measured: dict[str, dict[str, Any]]) -> None:
    found = measured["fails"]
    assert "nonsense" in found["error"]


@pytest.mark.parametrize("model", recognition.OWN)
def test_recognition(model: str, measured: dict[str, dict[str, Any]]) -> None:
    found = measured[model]
    assert found["recognition_seconds"] > 0
    assert (found["converted"], found["declined"]) == (1, 0)


def made_up(worker: str, jobs: list[dict[str, Any]], limit: float, late: str) -> list[dict[str, Any]]:
    """Quadratic as written, linear after; the largest does not fit."""
    job = jobs[0]
    if job.get("form") == "eager" and job["length"] == 16384:
        return [{"job": job, "error": "does not fit"}]
    seconds = 1e-6 * job["length"] ** (2 if job["form"] == "eager" else 1)
    found = {"seconds": seconds, "cpu_seconds": seconds, "peak_mib": 1.0}
    found |= {} if job["form"] == "eager" else {"compile_seconds": 2.0, "compile_peak_mib": 3.0}
    if "loglinear" in job["form"]:
        found |= {"recognition_seconds": 0.5, "converted": 1, "declined": 0, "untouched": 2}
    return [{"job": job, **found}]


def test_rewrite_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(rewrite, "in_process", made_up)
    file = tmp_path / "rewrite.json"
    assert cli.main(["bench", "rewrite", "--json", str(file), "--threads", "3", "--inductor"]) == 0
    record = json.loads(file.read_text())
    slopes = {(e["form"], e["backward"]): e["exponent"] for e in record["exponents"] if e["decay"] == "scalar"}
    assert slopes["eager", True] == 2
    assert slopes["loglinear", True] == slopes["loglinear:none", False] == 1
    assert len(record["results"]) == 2 * len(rewrite.FORMS) * 2 * len(rewrite.LENGTHS)
    assert record["threads"] == 3
    shown = capsys.readouterr().out
    assert "2.00" in shown
    assert "1.00" in shown


def test_recognition_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(recognition, "in_process", made_up)
    (tmp_path / "models.json").write_text('{"mamba2": {"class": "AutoModelForCausalLM", "kwargs": {}}}')
    file = tmp_path / "found.json"
    assert cli.main(["bench", "recognition", "--models", str(tmp_path / "models.json"), "--json", str(file)]) == 0
    rows = {row["model"]: row for row in json.loads(file.read_text())["summary"]}
    assert set(rows) == {*recognition.OWN, "mamba2"}
    assert rows["mamba2"]["ratio"] == pytest.approx(0.25, rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "WHAT"),
        (["nonsense"], "nonsense"),
        (["rewrite", "--decays", "odd"], "odd"),
        (["recognition", "--only", "odd"], "expected some of"),
        (["recognition", "--models", "no/such/file"], "no/such/file"),
    ],
)
def test_mistakes(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *arguments]) == cli.USAGE_ERROR
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


MEASURED = sorted((Path(__file__).parent.parent / "benchmarks" / "results").glob("rewrite-cpu-*.json"))


@pytest.mark.parametrize("file", MEASURED, ids=lambda file: file.stem)
def test_committed_measurements_can_be_drawn(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "speed.svg"
    assert cli.main(["bench", "plot", str(file), "--out", str(out)]) == 0
    drawn = out.read_text()
    assert all(f">{rewrite.FORMS[form]}<" in drawn for form in ("eager", "loglinear", "loglinear:none"))
    assert rewrite.FORMS["inductor"] not in drawn  # was not measured
    record = json.loads(file.read_text())
    record["results"] = [{**r, "error": "late"} for r in record["results"]]
    for r in record["results"]:
        r.pop("seconds", None)
    (tmp_path / "late.json").write_text(json.dumps(record))
    assert cli.main(["bench", "plot", str(tmp_path / "late.json"), "--out", str(out)]) == 1


def test_the_picture_in_the_readme_is_of_the_committed_measurements(tmp_path: Path) -> None:
    committed = Path(__file__).parent.parent / "docs" / "pictures" / "speed.svg"
    assert cli.main(["bench", "plot", str(MEASURED[-1]), "--out", str(tmp_path / "speed.svg")]) == 0
    assert re.findall(r">([^<>]+)</text>", (tmp_path / "speed.svg").read_text()) == re.findall(
        r">([^<>]+)</text>", committed.read_text()
    )


def test_first_step_writes_each_turn_with_its_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    steps = iter((10.0, 12.0, 10.0, 20.0, 10.0, 14.0))

    def made_up(backend: str, args: object) -> dict[str, float]:
        return {"step": next(steps), "its children": 10.0, "load": 1.5}

    file = tmp_path / "first.json"
    monkeypatch.setattr(first_step, "_in_process", made_up)
    monkeypatch.setattr("sys.argv", ["first_step", "--turns", "3", "--json", str(file)])
    first_step.main()
    found = json.loads(file.read_text())
    assert [turn["loglinear"]["step"] for turn in found["turns"]] == [12, 20, 14]
    assert found["ratio"] == pytest.approx(24 / 20)  # the median; the compiler counts
    assert found["turns"][0]["inductor"]["load"] == 1.5
    assert found["environment"]["versions"]["torch"] == torch.__version__
