"""`llcompile bench operator --device cpu`: peers compute the same, workers measure, figures add up."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import operator
from benchmarks.operator_calls import call, operands, peer
from benchmarks.operator_figures import TARGETS, comparisons, exponents, figures
from benchmarks.operator_plan import FAMILIES, LENGTHS, PEERS, STEP_CONTEXT, Job, Plan
from benchmarks.process import in_process
from llcompile.commands import cli

SMALL = {"heads": 2, "dim": 8, "repeats": 1, "kernels": "aten"}
Answers = list[dict[str, Any]]


@pytest.mark.parametrize("family", PEERS, ids="/".join)
def test_peers_compute_what_ours_does(family: tuple[str, str]) -> None:
    pytest.importorskip("transformers")
    job = asdict(Job("llcompile", *family, False, True, 100, **SMALL))  # type: ignore[arg-type]
    x = operands(job, weights=True, backward=True)
    theirs = peer(PEERS[family], x)()
    if family == ("scalar", "none"):
        x["v"] = (x["v"] * -x["log_decay"][..., None]).detach().requires_grad_()
    o, *gradients = call(job, x)()
    torch.testing.assert_close(o * (8**-0.5 if family[1] == "delta" else 1), theirs, atol=1e-5, rtol=1e-4)
    assert len(gradients) == len([name for name in x if name not in ("grad", "level_weights")])


@pytest.fixture(scope="module")
def measured() -> Answers:
    """A sequence, a step and a job that fails, in one process."""
    own = Job("llcompile", "scalar", "delta", False, False, 40, **SMALL)  # type: ignore[arg-type]
    jobs = [
        replace(own, weights=True),
        replace(own, weights=True, backward=True, dtype="bfloat16"),
        replace(own, kernels="nonsense"),
        *(replace(own, length=1000, step=True, weights=weights) for weights in (False, True)),
    ]
    return in_process("benchmarks.operator_worker", [asdict(job) for job in jobs], 300, "late", threads=1)


def test_the_worker_measures(measured: Answers) -> None:
    forward, backward, failed, *steps = measured
    for r in (forward, backward, *steps):
        assert 0 < r["fastest_seconds"] <= r["seconds"]
        assert r["turns"] >= 1
        assert r["peak_mib"] >= 0
    assert "nonsense" in failed["error"]
    assert "seconds" not in failed


def plan(**changes: Any) -> Plan:
    settings = [(dtype, threads) for threads in (1, 2) for dtype in ("float32", "bfloat16")]
    return replace(Plan(LENGTHS, FAMILIES, settings, ["cpp", "aten"], 5), **changes)


def made_up(seconds: Callable[[Job], float | str]) -> Callable[..., Answers]:
    """A worker whose jobs take what `seconds` says, or fail with it."""

    def worker(name: str, jobs: Answers, limit: float, late: str, threads: int | None = None) -> Answers:
        answers = []
        for job in jobs:
            found = seconds(Job(**job))
            if isinstance(found, str):
                answers.append({"job": job, "error": late if found == "late" else found})
            else:
                memory = 1.0 if job["runs"] == "llcompile" else 8.0
                answers.append({"job": job, "seconds": found, "cpu_seconds": found, "peak_mib": memory, "turns": 3})
        return answers

    return worker


def usual(job: Job) -> float | str:
    """Ours linear in the length, with levels 1.5 times, with its backward four times; peers four times ours."""
    if job.runs != "llcompile":
        return 4 * usual(replace(job, runs="llcompile")) * (0.5 if job.compiled else 1)  # type: ignore[operator]
    if job.step:
        return 2e-4 if job.weights else 1e-4
    slow = 3 if job.kernels == "aten" else 1
    return 1e-6 * slow * job.length * (1.5 if job.weights else 1) * (4 if job.backward else 1)


def measure(
    monkeypatch: pytest.MonkeyPatch, chosen: Plan, seconds: Callable[[Job], float | str] = usual, minutes: float = 10
) -> dict[str, Any]:
    from rich.console import Console

    monkeypatch.setattr(operator, "in_process", made_up(seconds))
    args = argparse.Namespace(minutes=minutes, quick=chosen.quick, compile_limit=60.0, device="cpu")
    return operator.measure(args, chosen, Console(quiet=True), lambda record: None)


def test_figures_are_of_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    record = measure(monkeypatch, plan())
    found: dict[str, set[float]] = {}
    for f in record["figures"]:
        found.setdefault(f["figure"], set()).add(f["value"])
        assert f["kernels"] == "cpp"
        assert f["met"] == TARGETS[f["figure"]].met(f["value"])
    assert found == {
        "faster": {2, 4},  # compiled for the first setting alone
        "memory": {0.125},
        "levels at 16384": {1.5},
        "levels at 65536": {1.5},
        "backward": {3},
        "exponent": {1},
        "step": {2},
        "step ms": {0.2},
    }
    missed = {f["figure"] for f in record["figures"] if not f["met"]}
    assert missed == {"faster", "step", "step ms"}
    assert {f["dtype"] for f in record["figures"]} == {"float32", "bfloat16"}
    assert {f["threads"] for f in record["figures"]} == {1, 2}
    assert {(f["decay"], f["correction"]) for f in record["figures"] if f["figure"] == "faster"} == set(PEERS)


def test_a_slower_operator_misses_its_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    record = measure(monkeypatch, plan(), lambda job: usual(job) if job.runs != "llcompile" else 1e-9 * job.length**2)
    missed = {f["figure"] for f in record["figures"] if not f["met"]}
    assert {"faster", "exponent", "step ms"} <= missed
    (slope,) = {e["exponent"] for e in record["exponents"]}
    assert slope == 2


def test_times_are_compared_within_a_process() -> None:
    job = Job("llcompile", "scalar", "delta", False, False, 4096, kernels="cpp")
    rows = [
        (job, 0, 1.0), (replace(job, runs="x"), 0, 4.0),
        (job, 1, 2.0), (replace(job, runs="x", compiled=True), 1, 6.0),
    ]  # fmt: skip
    results = [
        {"job": asdict(job), "process": process, "seconds": seconds, "cpu_seconds": seconds, "peak_mib": 1.0}
        for job, process, seconds in rows
    ]
    (row,) = comparisons(results, "cpp")
    assert (row["form"], row["times_faster"], row["seconds"]) == ("Inductor", 3.0, 2.0)
    assert exponents(results) == []
    assert {f["figure"] for f in figures(results, "aten")} == set()


def test_what_is_given_up_is_not_tried_at_greater_length(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Job] = []

    def seconds(job: Job) -> float | str:
        if job.compiled:
            tried.append(job)
        return "late" if job.compiled and job.correction == "delta" else usual(job)

    record = measure(monkeypatch, plan(), seconds)
    assert [(job.length, job.backward) for job in tried if job.correction == "delta"] == [(4096, False)] * 2
    assert len([job for job in tried if job.correction == "none"]) == 4
    notes = {note for row in record["peers"] for note in row["notes"]}
    assert "Inductor: compilation given up after 60 s" in notes
    assert "Inductor: compilation given up, as fwd at 4096 was" in notes


def test_no_process_starts_when_the_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    record = measure(monkeypatch, plan(), minutes=0.1)
    assert record["results"] == []
    assert len(record["left_out"]) == sum(len(series) for series in plan().series())


def test_the_plan_has_every_setting_once() -> None:
    jobs = [job for series in plan().series() for job in series if not job.compiled]
    own = [job for job in jobs if job.runs == "llcompile" and not job.step and job.kernels == "cpp"]
    first = set(own)
    assert len(first) == len(FAMILIES) * len(LENGTHS) * 2 * 2 * 4
    assert {(job.dtype, job.threads, job.length) for job in jobs if job.step} == {
        (dtype, 1, STEP_CONTEXT) for dtype in ("float32", "bfloat16")
    }
    peers = [job for job in jobs if job.runs != "llcompile"]
    assert len({(job.decay, job.correction, job.length) for job in peers}) == len(PEERS) * 2
    without = [job for series in plan(peers=False).series() for job in series]
    assert {job.runs for job in without} == {"llcompile"}


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(operator, "in_process", made_up(usual))
    monkeypatch.delenv("LLCOMPILE_KERNELS", raising=False)
    file = tmp_path / "operator.json"
    assert cli.main(["bench", "operator", "--kernels", "aten", "auto", "--output", str(file)]) == 0
    record = json.loads(file.read_text())
    assert record["kernels"] == ["aten", "auto"]
    assert {"before", "after"} <= set(record["load"])
    assert {"cpu", "date", "versions", "machine", "figures"} <= set(record)
    shown = capsys.readouterr().out
    assert "NOT met" in shown
    assert "step after 131072" in shown
    assert file.with_suffix(".png").is_file()
    assert cli.main(["bench", "plot", str(file), "--out", str(tmp_path / "again.svg")]) == 0
    drawn = (tmp_path / "again.svg").read_text()
    assert all(f">{words}<" in drawn for words in ("linear, auto", "log-linear, aten", "transformers, Inductor"))


def test_a_failure_of_ours_fails_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(operator, "in_process", made_up(lambda job: "broken" if job.weights else usual(job)))
    output = str(tmp_path / "operator.json")
    assert cli.main(["bench", "operator", "--quick", "--kernels", "aten", "--output", output]) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--kernels", "atem"], "did you mean 'aten'"),
        (["--families", "scalar/dleta"], "did you mean 'scalar/delta'"),
        (["--threads", "0"], "--threads"),
        (["--minutes", "0"], "--minutes"),
        (["--against", "fla"], "--device cuda"),
    ],
)
def test_mistakes(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "operator", *arguments]) == cli.USAGE_ERROR
    assert words in capsys.readouterr().err
