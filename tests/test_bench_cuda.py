"""The GPU benchmark as far as a CPU goes: the plan, the roofline, the budget, the processes, goals, messages, plots."""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.cuda import chip, command, peers, warm
from benchmarks.cuda.budget import CASE_LIMIT, PATIENCE, run_plan
from benchmarks.cuda.cases import LENGTHS, LEVELS, OURS, OWN, QUICK, ROUNDS, Case, plan
from benchmarks.cuda.crew import Helper
from benchmarks.cuda.goals import GOALS, evaluate
from benchmarks.cuda.operands import bytes_of, make
from benchmarks.cuda.roofline import count, levels, mean_blocks
from benchmarks.cuda.show import show
from benchmarks.cuda.timing import timed
from benchmarks.cuda.worker import Worker
from benchmarks.operator_plan import FAMILIES
from llcompile.commands import cli
from llcompile.errors import BenchError, SpecError

EVERYBODY = [*OWN, *(p.runner for p in peers.PEERS)]
SMALL = {"length": 128, "heads": 2, "groups": 2, "key_dim": 16, "value_dim": 16}


def small(runs: str = OURS, operator: Any = "log-linear", phase: Any = "both", **more: Any) -> Case:
    return Case(**{"runs": runs, "operator": operator, "decay": "scalar", "correction": "none", "phase": phase,
                   **SMALL, **more})  # fmt: skip


# -- what is measured ------------------------------------------------------------------------------------------------


def test_plan_starts_with_the_goals() -> None:
    cases = plan(EVERYBODY)
    assert {(c.length, c.phase) for c in cases[:9]} == {(2**16, "both")}
    assert {c.runs for c in cases[:9]} == {r.runs for r in EVERYBODY} - {"fla-kda"}
    asked = [g for g in GOALS if g.bound != 2.5]
    for goal in asked:  # each can be judged after the first three rounds
        early = plan(EVERYBODY, ROUNDS[:3])
        made_up = [{"case": asdict(c), "milliseconds": 1.0, "roofline_milliseconds": 1.0} for c in early]
        assert evaluate(made_up, [goal])[0]["met"] is not None, goal.words


def test_plan_covers_everything_once() -> None:
    cases = plan(EVERYBODY)
    assert len(cases) == len(set(cases))
    assert {(c.batch, c.key_dim, c.value_dim) for c in cases} == {(b, k, v) for b in (1, 8) for k in (64, 128)
                                                                  for v in (64, 128)}  # fmt: skip
    assert {c.length for c in cases} == set(LENGTHS) == {2048 << n for n in range(8)}
    assert {c.family for c in cases if c.runs == OURS} == set(FAMILIES)
    assert {c.heads for c in cases} == {32}


def test_plan_keeps_what_was_asked_for() -> None:
    cases = plan(EVERYBODY, lengths=[4096], families=[("channel", "delta")])
    assert {c.length for c in cases} == {4096}
    assert {c.family for c in cases if c.operator != "softmax"} == {("channel", "delta")}


def test_levels_are_enough_for_the_longest() -> None:
    assert levels(LENGTHS[-1]) == LEVELS


def test_kinds_compile_each_kernel_once() -> None:
    kinds = warm.kinds(plan(EVERYBODY))
    assert {c.length for c in kinds if c.runs == OURS} == {2048}
    assert {c.length for c in kinds if c.runs == "fla-log-linear"} == set(LENGTHS)
    assert {c.phase for c in kinds} == {"both", "decode"}
    assert not any(c.operator == "softmax" for c in kinds)


# -- the roofline ----------------------------------------------------------------------------------------------------

# An H200's copy and matrix rates, one group of queries and keys as Mamba-2 has.
H200 = (4.3e12, 790e12)
DESIGN = {"length": 65536, "batch": 1, "heads": 32, "key_dim": 128, "value_dim": 64, "groups": 1, "phase": "forward"}


@pytest.mark.parametrize(("operator", "milliseconds"), [("linear", 0.15), ("log-linear", 0.37)])
def test_roofline_of_the_design(operator: str, milliseconds: float) -> None:
    assert round(count(small(operator=operator, **DESIGN)).milliseconds(*H200), 2) == milliseconds


def test_bytes_by_hand() -> None:
    """q, k of one group; v, o of 32 heads; a decay of 4 bytes; 17 levels of 2 bytes."""
    tokens = 65536
    linear = tokens * (2 * 128 * 2 + 32 * (2 * 64 * 2 + 4))
    assert count(small(operator="linear", **DESIGN)).bytes == linear
    assert count(small(operator="log-linear", **DESIGN)).bytes == linear + tokens * 32 * 17 * 2


def test_blocks_by_hand() -> None:
    assert mean_blocks(65536) == 5  # ten bits of 1024 chunks' indices, half of them set
    assert mean_blocks(3 * 64) == (0 + 1 + 1) / 3


def test_softmax_by_hand() -> None:
    case = Case("sdpa-flash", "softmax", "none", "none", "forward", 1024, 2, 4, 64, 64, 4)
    assert count(case).operations == 2 * 4 * 1024 * 1024 * 64 * 4 / 2
    assert count(case).bytes == 2 * 1024 * 4 * 64 * 4 * 2


def test_decode_by_hand() -> None:
    """Position 2/3 of 2**17 is 0b10101010101010101: nine levels hold something, and the token's own."""
    case = small(phase="decode", length=2**17, heads=1, groups=1)
    states = 10 * 16 * 16 * 4 * 2
    assert count(case).bytes == states + 2 * (4 * 16) + 4 + 18 * 2


@pytest.mark.parametrize("family", FAMILIES)
def test_more_work_takes_longer(family: tuple[str, str]) -> None:
    linear, log_linear = (small(operator=o, decay=family[0], correction=family[1]) for o in ("linear", "log-linear"))
    assert count(linear).operations < count(log_linear).operations < count(replace(log_linear, length=256)).operations
    assert count(replace(linear, phase="forward")).milliseconds(*H200) < count(linear).milliseconds(*H200)


# -- the budget ------------------------------------------------------------------------------------------------------


class Clock:
    """A clock that moves only when something is measured."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def measure(self, case: Case, seconds: float) -> dict[str, Any]:
        self.now += 10
        return {"milliseconds": 1.0, "peak_mib": 1.0}


def test_budget_cuts_the_least_telling() -> None:
    cases, clock, kept = plan(EVERYBODY)[:8], Clock(), []
    results, left_out = run_plan(cases, clock.measure, 45, lambda r, out: kept.append((len(r), len(out))), H200, clock)
    assert [r["case"] for r in results] == [asdict(c) for c in cases[:5]]
    assert left_out == [c.title for c in cases[5:]]
    assert kept == [(1, 0), (2, 0), (3, 0), (4, 0), (5, 0), (5, 3)]  # after every case, and at the end
    assert results[0]["roofline_milliseconds"] == count(cases[0]).milliseconds(*H200)


def test_a_case_that_the_end_cuts_off_is_left_out() -> None:
    clock, case = Clock(), small()

    def measure(case: Case, seconds: float) -> dict[str, Any]:
        clock.now += seconds
        return {"error": f"given up after {seconds} s"}

    assert run_plan([case], measure, 20, lambda r, out: None, None, clock) == ([], [case.title])


def test_a_case_has_a_limit_that_shrinks_with_the_time_left() -> None:
    asked: list[float] = []
    clock = Clock()
    clock.now = 90

    def measure(case: Case, seconds: float) -> dict[str, Any]:
        asked.append(seconds)
        clock.now += 25
        return {"skipped": "odd"}

    run_plan([small(length=n) for n in (64, 128, 256)], measure, 190, lambda r, out: None, None, clock)
    assert asked == [CASE_LIMIT, CASE_LIMIT, 50]


def test_a_peer_that_fails_is_recorded_and_not_asked_for_ever() -> None:
    cases = [small(length=64 * n) for n in range(1, 5)]
    results, _ = run_plan(cases, lambda case, seconds: {"error": "odd"}, 1, lambda r, out: None, None, lambda: 0.0)
    assert [r.get("error") for r in results] == ["odd"] * PATIENCE + [None] * (4 - PATIENCE)
    assert all("failed" in r["skipped"] for r in results[PATIENCE:])


def test_timed() -> None:
    """The first call and the warm ones do not count; slow calls are timed three times."""
    clock = Clock()

    def watch(run: Any) -> tuple[float, float]:
        clock.now += run()
        return run() * 1e3, 0.5

    found = timed(lambda: 0.1, watch, warm=0.35, seconds=0.75, clock=clock)
    assert found.runs == 8
    assert clock.now == pytest.approx(0.1 * (1 + 4 + 8))
    assert found.milliseconds == found.low == found.high == 100
    assert timed(lambda: 2, watch, clock=clock).runs == 3


def test_chip() -> None:
    assert chip.bandwidth("cpu", 2**16) > 0
    assert chip.rate("cpu", 32) > 0


# -- processes -------------------------------------------------------------------------------------------------------

ECHO = "import json, sys, time\nfor line in sys.stdin:\n  r = json.loads(line)\n  time.sleep(r['sleep'])\n"
ECHO += "  print('odd', file=sys.stderr)\n  sys.exit(3) if r['die'] else print(json.dumps(r), flush=True)\n"


def test_helper_outlives_its_process() -> None:
    helper = Helper("none", command=[sys.executable, "-c", ECHO])
    fine = {"sleep": 0, "die": False}
    try:
        assert helper.ask(fine, 60) == fine
        assert helper.ask({"sleep": 60, "die": False}, 0.3) == {"error": "given up after 0 s"}
        assert helper.ask(fine, 60) == fine
        assert helper.ask({"sleep": 0, "die": True}, 60) == {"error": "the process ended: odd"}
        assert helper.ask({**fine, "last": True}, 60) == fine  # an answer, and the end of the process
        assert helper.process is None
        assert helper.ask(fine, 60) == fine
    finally:
        helper.stop()


@pytest.mark.parametrize("phase", ["forward", "both", "decode"])
@pytest.mark.parametrize("operator", ["linear", "log-linear"])
def test_worker_measures_ours(operator: str, phase: str) -> None:
    found = Worker("cpu").answer({"what": "case", "case": asdict(small(operator=operator, phase=phase))})
    assert found["milliseconds"] > 0, found
    json.dumps(found)


def test_worker_reports_what_a_peer_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(*args: object, **kwargs: object) -> None:
        raise RuntimeError("odd\nand long")

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", raises)
    case = small("sdpa-flash", "softmax", decay="none")
    assert Worker("cpu").answer({"what": "case", "case": asdict(case)}) == {"error": "RuntimeError: odd"}


def test_worker_knows_limits() -> None:
    case = small("sdpa-flash", "softmax", decay="none", key_dim=32)
    assert "K = 32" in Worker("cpu").answer({"what": "case", "case": asdict(case)})["skipped"]


def test_compile_ahead_asks_for_everything_once() -> None:
    asked: list[Any] = []

    class Fake(Helper):
        def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
            asked.append(request["case"]["length"])
            return {"error": "odd"} if request["case"]["length"] == 3 else {"compiled": True}

    assert warm.compile_ahead([small(length=n) for n in range(1, 6)], 60, 2, lambda: Fake("none")) == 4
    assert sorted(asked) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("case", plan(OWN, QUICK))
def test_bytes_that_operands_take(case: Case) -> None:
    case = replace(case, heads=2, groups=2, length=64)
    taken = sum(t.nbytes for t in make(case, "cpu").values())
    if case.phase == "forward":
        assert bytes_of(case) == taken + 64 * 2 * case.value_dim * 2  # and the output


# -- peers -----------------------------------------------------------------------------------------------------------


def test_peers_are_chosen_by_name_or_library() -> None:
    assert [p.name for p in peers.chosen("sdpa")] == ["sdpa-flash", "sdpa-cudnn"]
    assert [p.name for p in peers.chosen("fla-kda,sdpa-cudnn")] == ["fla-kda", "sdpa-cudnn"]
    assert peers.chosen(None) == list(peers.PEERS)
    assert peers.chosen("none") == []
    with pytest.raises(SpecError, match="did you mean 'fla-kda'"):
        peers.chosen("fla-kad")


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("fla-log-linear", {"length": 2**18}, "131072"),
        ("fla-log-linear", {"length": 100}, "multiple of 64"),
        ("fla-log-linear", {"key_dim": 96}, "K = 96"),
        ("fla-log-linear", {"value_dim": 96}, "V = 96"),
        ("fla-log-linear", {}, None),
        ("fla-kda", {"key_dim": 512}, "256"),
        ("sdpa-cudnn", {"value_dim": 64}, None),
    ],
)
def test_limits(name: str, change: dict[str, int], words: str | None) -> None:
    found = peers.peer(name).limits(small(name, **{"key_dim": 128, "value_dim": 128, **change}))
    assert found is None if words is None else found is not None and words in found


def test_absent_peers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = peers.presence(replace(peers.PEERS[0], module="no_such_module"))
    assert absent == {"name": "fla-log-linear", "absent": "ModuleNotFoundError: No module named 'no_such_module'"}
    assert peers.presence(peers.peer("sdpa-flash")) == {"name": "sdpa-flash", "version": torch.__version__}


@pytest.mark.parametrize("phase", ["forward", "decode"])
@pytest.mark.parametrize("row", [p for p in peers.PEERS if p.library == "fla"], ids=lambda p: p.name)
def test_arguments_fit_what_is_installed(row: peers.Peer, phase: str) -> None:
    """FLA's functions run on a GPU only, but their signatures can be read here."""
    pytest.importorskip("fla")
    signature = inspect.signature(inspect.unwrap(row.load(phase)))
    case = small(row.name, row.operator, phase, decay=row.families[0][0], correction=row.families[0][1])
    x = make(case, "cpu", tokens=1 if phase == "decode" else None)

    def bind(*args: Any, **kwargs: Any) -> Any:
        assert "kwargs" not in signature.bind(*args, **kwargs).arguments  # nothing is taken and ignored
        return x["v"], None

    assert (row.call(bind, x) is x["v"]) if phase == "forward" else row.step(bind, x, case)()


# -- goals, tables, files --------------------------------------------------------------------------------------------


def result(case: Case, ms: float) -> dict[str, Any]:
    return {"case": asdict(case), "milliseconds": ms, "peak_mib": 1.0, "roofline_milliseconds": 1.0}


def test_goals_take_the_worst_and_the_fastest_rival() -> None:
    own = Case(OURS, "log-linear", "scalar", "none", "both", 2**16)
    peer = replace(own, runs="fla-log-linear")
    linear = replace(own, runs="fla-simple-gla", operator="linear")
    wide = {"batch": 8}
    found = [result(own, 2), result(peer, 16), result(linear, 1), result(replace(own, **wide), 3),
             result(replace(peer, **wide), 6), result(replace(own, correction="delta"), 99)]  # fmt: skip
    for backend, ms in (("sdpa-flash", 9), ("sdpa-cudnn", 4)):
        found.append(result(Case(backend, "softmax", "none", "none", "both", 2**16), ms))
    outcomes = {o["goal"].split(":")[0][:14] + str(o["bound"]): o for o in evaluate(found)}
    assert outcomes["fwd+bwd at 64k0.25"]["measured"] == 0.5  # B=8 is the worst
    assert outcomes["fwd+bwd at 64k0.25"]["met"] is False
    assert "B=8" in outcomes["fwd+bwd at 64k0.25"]["where"]
    assert outcomes["fwd+bwd at 64k1.5"]["measured"] == 2
    assert outcomes["gated delta at2.0"]["met"] is None
    assert outcomes["faster than SD1.0"]["measured"] == 99 / 4
    assert outcomes["within 2.5x of2.5"]["comparisons"] == 3


def arguments(**more: Any) -> argparse.Namespace:
    given = {"device": "cpu", "quick": True, "against": None, "minutes": 1.0, "lengths": None, "families": None}
    return argparse.Namespace(**given | more)


class Pretender(Helper):
    """Answers as a worker on a GPU would: FLA absent, cuDNN failing."""

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        if request["what"] == "chip":
            return {"name": "made up", "driver": "1", "memory_gib": 1.0, "bandwidth": 4e12, "rate": 8e14}
        if request["what"] == "peers":
            return {"peers": [{"name": p.name, **({"absent": "no"} if p.library == "fla" else {"version": "1"})}
                              for p in peers.PEERS]}  # fmt: skip
        if request["case"]["runs"] == "sdpa-cudnn":
            return {"error": "RuntimeError: no kernel"}
        return {"milliseconds": request["case"]["length"] / 1e3, "peak_mib": 2.0}


def made_up_run(path: Path, **more: Any) -> dict[str, Any]:
    helper = Pretender("none")
    asked = peers.chosen(more.get("against"))
    return command.measure(arguments(**more), asked, helper, lambda record: command.write(path, record))


def test_a_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.json"
    record = made_up_run(path)
    assert json.loads(path.read_text()) == record
    assert {"date", "machine", "versions", "chip", "peers", "results", "left_out", "goals"} <= record.keys()
    assert not any(r["case"]["runs"].startswith("fla") for r in record["results"])
    show(record)
    shown = capsys.readouterr().out
    for words in ("fla-kda: absent (no)", "RuntimeError: no kernel", "not measured", "made up, driver 1", "fwd+bwd"):
        assert words in shown


def test_peers_can_be_left_out(tmp_path: Path) -> None:
    record = made_up_run(tmp_path / "run.json", against="sdpa-flash")
    assert [p["name"] for p in record["peers"]] == ["sdpa-flash"]
    assert {r["case"]["runs"] for r in record["results"]} == {OURS, "sdpa-flash"}


def test_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "run.json", tmp_path / "picture.png"
    made_up_run(path)
    plot = ["bench", "plot", str(path), "--out", str(out)]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(plot) == 1
    assert "llcompile[plot]" in capsys.readouterr().err
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    assert cli.main(plot) == 0
    assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("text", "words"), [(None, "cannot be read"), ("{", "not JSON"), ("{}", "holds no times")])
def test_plot_of_something_else(
    tmp_path: Path, text: str | None, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "file.json"
    if text is not None:
        path.write_text(text)
    assert cli.main(["bench", "plot", str(path), "--out", str(tmp_path / "p.png")]) == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--device", "cuda", "--against", "flsa"], "did you mean"),
        (["--against", "fla"], "--device cuda"),
        (["--device", "cuda", "--families", "scaler/none"], "scalar/none"),
        (["--device", "cuda", "--minutes", "0"], "--minutes"),
        (["--device", "cuda", "--lengths", "1000"], "2048"),
    ],
)
def test_mistakes(given: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "operator", *given]) == cli.USAGE_ERROR
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BenchError, match=r"no CUDA device here.*on_gpu\.sh.*--device cpu"):
        command.need_device("cuda")
