"""The demo: its task, its loop, and (slow) its whole run."""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from rich.console import Console

import demo
from demo import acts, show
from demo.acting import Acting, check_acts, check_differs
from demo.experiment import Bench, Outcome
from demo.models import TOUR, recall_model
from demo.progress import Bars
from demo.recall import DISTANCES, IGNORED, Accuracy, Exam, Task
from demo.training import ARMS, Plan, Runner, is_level_weight, learn
from llcompile.checks import verify
from llcompile.commands import cli
from llcompile.errors import DemoError
from llcompile.passes import pipeline
from llcompile.passes.session import Session
from llcompile.weights.level_weights import LevelWeights

SMALL = Task(length=32, pairs=6, keys=12, values=4)
SHORT = Plan(steps=3, more=2, batch=4, measures=2)


def test_no_training_sees_the_exam() -> None:
    """A CPU's generator keeps 32 bits of the exam's seed, which are those of seed 0."""
    task = Task()
    held = {tuple(row) for batch in Exam(task).batches for row in batch.tokens.tolist()}
    seen = {
        tuple(row) for _, batch in zip(range(64), task.stream(16, 0), strict=False) for row in batch.tokens.tolist()
    }
    assert (len(held), len(seen)) == (256, 1024)
    assert not held & seen


class Silence:
    def stage(self, text: str, steps: int | None = None) -> Callable[[], None]:
        return lambda: None


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("task", [Task(), SMALL, Task(length=20, pairs=30, keys=31, values=2)], ids=str)
@pytest.mark.parametrize("distances", DISTANCES)
def test_every_query_has_its_pair_at_the_distance_it_says(task: Task, distances: str) -> None:
    task = Task(task.length, task.pairs, task.keys, task.values, distances)
    batch = task.draw(50, generator())
    asked = (batch.answers != IGNORED).nonzero().tolist()
    assert len(asked) >= 50
    for row, at in asked:
        tokens = batch.tokens[row].tolist()
        key = tokens[at]
        bound = tokens.index(key)
        assert at % 2 == bound % 2 == 0
        assert tokens.count(key) == 2
        assert tokens[bound + 1] == batch.answers[row, at]
        assert tokens[at + 1] == task.blank
        octave = int(batch.octaves[row, at])
        assert 2**octave <= (at - bound) // 2 < 2 ** (octave + 1)
        if distances == "key":
            assert octave == key % task.octaves


def test_sequences_hold_pairs_queries_and_blanks_only() -> None:
    task = Task()
    tokens = task.draw(100, generator()).tokens
    first, second = tokens[:, ::2], tokens[:, 1::2]
    assert ((first < task.keys) | (first == task.blank)).all()
    assert ((second >= task.keys) & (second < task.vocabulary)).all()
    bound = (second != task.blank).sum(1)
    assert torch.equal(bound, (task.draw(100, generator()).answers != IGNORED).sum(1))  # each pair is asked for once
    assert bound.double().mean() > 0.85 * task.pairs
    assert bound.max() <= task.pairs


def test_a_key_says_nothing_about_the_distance_where_it_must_not() -> None:
    batch = Task(distances="any").draw(500, generator())
    asked = batch.answers != IGNORED
    octaves = batch.octaves[asked & (batch.tokens == 0)]
    assert set(octaves.tolist()) == set(range(Task().octaves))


def test_the_stream_is_fresh_and_repeatable() -> None:
    batches = [batch.tokens for _, batch in zip(range(70), SMALL.stream(4, seed=1), strict=False)]
    again = [batch.tokens for _, batch in zip(range(70), SMALL.stream(4, seed=1), strict=False)]
    other = next(SMALL.stream(4, seed=2)).tokens
    assert all(torch.equal(a, b) for a, b in zip(batches, again, strict=True))
    assert len({tuple(row.tolist()) for batch in batches for row in batch}) > 275
    assert not torch.equal(batches[0], other)


def test_accuracy_counts_queries_alone() -> None:
    exam = Exam(SMALL, sequences=40, batch=8)
    perfect = [torch.nn.functional.one_hot(b.answers.clamp(min=0), SMALL.vocabulary).float() for b in exam.batches]
    assert exam.accuracy(perfect).overall == 1.0
    assert set(exam.accuracy(perfect).by_octave) == {1.0}
    assert exam.accuracy([-scores for scores in perfect]).overall == 0.0
    assert exam.accuracy(perfect).queries == sum(int((b.answers != IGNORED).sum()) for b in exam.batches)
    assert Exam(Task()).accuracy([torch.zeros(*b.tokens.shape, 77) for b in Exam(Task()).batches]).queries >= 2000


def test_the_loop_learns() -> None:
    torch.manual_seed(0)
    model = recall_model(SMALL)
    groups = [{"params": list(model.parameters()), "lr": 1e-2}]
    ticks: list[int] = []
    tick = lambda: ticks.append(1)  # noqa: E731
    exam = Exam(SMALL, sequences=64, batch=8)
    curve = learn(Runner(model), exam, Plan(batch=8, measures=4), groups, steps=60, seed=0, tick=tick)
    assert [step for step, _ in curve] == [0, 15, 30, 45, 60]
    assert len(ticks) == 60
    assert curve[-1][1] > max(0.3, curve[0][1] + 0.1)  # chance is 1/4 among values, 1/17 among tokens


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(SMALL, SHORT, inner="eager")


def test_one_seed_from_end_to_end(bench: Bench, warm_dynamo: None) -> None:
    assert [mixer.module for mixer in bench.report.converted] == ["backbone.layers.0.mixer"]
    outcome = bench.run(3, Silence())
    assert outcome.converted == outcome.before
    assert outcome.moved < 1e-5
    assert outcome.acting.moved["backbone.layers.0.mixer"] > 1e-3
    assert set(outcome.without) == {"level weights alone", "all weights"}
    assert set(outcome.after) == set(outcome.curves) == {arm.name for arm in ARMS}
    assert [step for step, _ in outcome.curves["all weights"]] == [0, 1, 2]
    # All start from the checkpoint, whatever ran before them on the same model.
    assert {curve[0][1] for curve in outcome.curves.values()} == {outcome.before.overall}
    assert bench.run(3, Silence()) == outcome


def test_each_arm_trains_what_its_name_says(bench: Bench, warm_dynamo: None) -> None:
    for arm in ARMS:
        runner = bench.converted if arm.converted else bench.linear
        before = runner.state()
        learn(runner, bench.exam, SHORT, arm.groups(runner.model, SHORT), 2, seed=0)
        moved = {name for name, tensor in runner.state().items() if not torch.equal(tensor, before[name])}
        levels = {name for name in moved if is_level_weight(name)}
        assert bool(levels) == arm.converted
        assert bool(moved - levels) == (arm.name != "level weights alone")


# -- a conversion that does nothing

change = pipeline.change


def no_rewrite(session: Session) -> None:
    """What `pipeline.change` would do if every mixer were declined without a word."""
    for candidate in session.candidates:
        candidate.decline("not today")
    change(session)


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch, fresh_dynamo: None) -> None:
    """Everything says that the model was converted, and the compiled graph is the linear one.

    The run at the end of `convert` would find out, so that it is left out.
    """
    monkeypatch.setattr(pipeline, "change", no_rewrite)
    monkeypatch.setattr(verify, "verify", lambda *_: verify.Verdict(unverified="left out"))


@pytest.mark.filterwarnings("ignore::llcompile.errors.LLCompileWarning")
def test_a_conversion_that_does_nothing_stops_the_demo(silent: None) -> None:
    bench = Bench(SMALL, SHORT, inner="eager")
    assert bench.report.converted
    with pytest.raises(DemoError, match=r"noise on the level weights of backbone\.layers\.0\.mixer does not change"):
        bench.run(0, Silence())


@pytest.mark.filterwarnings("ignore::llcompile.errors.LLCompileWarning")
def test_a_model_of_the_tour_that_does_not_act_stops_the_demo(silent: None) -> None:
    sizes = {**dict(TOUR)["mamba2"], "num_hidden_layers": 1}
    with pytest.raises(DemoError, match="Mamba2ForCausalLM was converted but does not act"):
        acts.convert_and_compare("mamba2", sizes)


def test_a_model_of_the_tour_acts(fresh_dynamo: None) -> None:
    report, moved, acting, _ = acts.convert_and_compare(*TOUR[0])
    assert len(report.converted) == len(acting.moved) == 2
    assert moved < 1e-5
    assert min(acting.moved.values()) > 1e-3
    assert "The level weights act" in str(acting)


class Scaled(torch.nn.Module):
    """Has level weights, and one of them may have no part in the output."""

    def __init__(self, used: int, learns: bool = True) -> None:
        super().__init__()
        self.first, self.second = (torch.nn.Identity() for _ in range(2))
        for owner in (self.first, self.second):
            owner.add_module("loglinear", LevelWeights("static", 1, 3))
        self.used, self.learns = used, learns

    def forward(self) -> torch.Tensor:
        owners = (self.first, self.second)[: self.used]
        logits = sum(owner.loglinear(torch.ones(1, 2)).flatten(1) for owner in owners) * torch.ones(1, 6)
        return logits if self.learns else logits.detach()


def test_each_mixer_has_to_act_and_to_learn() -> None:
    model = Scaled(2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    acting = check_acts(model, model, "it")
    assert set(acting.moved) == {"first", "second"}
    assert acting.gradients == 2
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with pytest.raises(DemoError, match="level weights of second does not change"):
        check_acts(one := Scaled(1), one, "it")
    with pytest.raises(DemoError, match="no gradient reaches first"):
        check_acts(deaf := Scaled(2, learns=False), deaf, "it")
    with pytest.raises(DemoError, match="no mixer was converted"):
        check_acts(torch.nn.Linear(2, 2), lambda: torch.ones(2), "it")


def test_numbers_of_the_control_stop_the_demo() -> None:
    mine = torch.randn(2, 3)
    check_differs("all weights", mine, {"staying linear": mine + 1e-6})
    with pytest.raises(DemoError, match=r"'all weights' was converted.* equal those of staying linear bit for bit"):
        check_differs("all weights", mine, {"the start": mine + 1, "staying linear": mine.clone()})


def outcome(seed: int, control: float, alone: float, everything: float) -> Outcome:
    def accuracy(share: float) -> Accuracy:
        return Accuracy(share, (share,) * SMALL.octaves, 2000)

    after = dict(zip((arm.name for arm in ARMS), map(accuracy, (control, alone, everything)), strict=True))
    curves = {name: [(0, 0.5), (2, share.overall)] for name, share in after.items()}
    without = {arm.name: accuracy(0.25) for arm in ARMS if arm.converted}
    acting = Acting({"backbone.layers.0.mixer": 0.4}, 2)
    return Outcome(seed, accuracy(0.5), accuracy(0.5), 1e-7, acting, [(0, 0.1), (3, 0.5)], curves, after, without)


def test_losses_are_called_losses() -> None:
    lines = show.verdict([outcome(0, control=0.6, alone=0.55, everything=0.7)])
    assert lines == [
        "level weights alone: 5.0 points below staying linear",
        "all weights: 10.0 points above staying linear",
    ]
    mixed = show.verdict([outcome(0, 0.6, 0.5, 0.7), outcome(1, 0.6, 0.65, 0.7)])
    assert mixed[0].endswith("2.5 points below staying linear (from -10.0 to +5.0, above in 1 of 2 seeds)")


@pytest.mark.parametrize("seeds", [1, 3])
def test_tables_fit_a_terminal(seeds: int) -> None:
    outcomes = [outcome(seed, 0.6, 0.5, 0.7 + 0.01 * seed) for seed in range(seeds)]
    console = Console(file=io.StringIO(), width=80)
    console.print(show.accuracies(outcomes, SHORT), show.by_distance(outcomes, SHORT, SMALL))
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in printed
    for text in ("seed 0", "+2 steps: level weights alone", "0.600", "0.700", "2-3"):
        assert text in printed
    assert ("deviation" in printed) == (seeds > 1)


def test_the_plot_and_the_numbers_are_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    outcomes = [outcome(0, 0.6, 0.5, 0.7), outcome(1, 0.6, 0.5, 0.7)]
    png = show.plot(outcomes, SMALL, SHORT, tmp_path / "new")
    assert png is not None
    assert png.read_bytes()[:4] == b"\x89PNG"
    numbers = json.loads(show.save(outcomes, SMALL, SHORT, tmp_path / "new").read_text())
    assert numbers["outcomes"][1]["after"]["all weights"]["overall"] == 0.7


def test_progress_says_something_without_a_terminal() -> None:
    console = Console(file=io.StringIO(), force_terminal=False)
    with Bars(console) as bars:
        tick = bars.stage("first", 2)
        tick()
        tick()
        bars.stage("second")()
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [line.split(":")[0].strip() for line in lines] == ["first", "second"]


def test_progress_bars_on_a_terminal() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with Bars(console) as bars:
        tick = bars.stage("first", 2)
        tick()
        tick()
        bars.stage("second")()
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "2/2" in printed
    assert "1/1" in printed


@pytest.mark.parametrize("wrong", ["--seeds=0", "--steps=-1", "--distances=far"])
def test_arguments_are_checked(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", wrong]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_every_default_is_set() -> None:
    parser = argparse.ArgumentParser()
    demo.add_parser(parser.add_subparsers())
    args = parser.parse_args(["demo"])
    assert (args.seeds, args.seed, args.distances, args.out) == (1, 0, "key", Path("demo-output"))


@pytest.mark.slow
def test_the_whole_demo_in_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--steps", "20", "--more", "4", "--seeds", "2", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for text in ("Mamba2ForCausalLM", "Qwen3NextForCausalLM", "softmax attention", "deviation", "Next, with"):
        assert text in printed
    assert printed.count("The level weights act: noise on the level weights of one mixer changes the logits by") == 3
    assert printed.count("with its level weights reset to 1") == 2
    assert (tmp_path / "recall.png").stat().st_size > 10_000
    assert len(json.loads((tmp_path / "recall.json").read_text())["outcomes"]) == 2


@pytest.mark.slow
def test_level_weights_gain_where_the_key_tells_the_distance() -> None:
    plan = Plan(steps=1200, more=400)
    outcome = Bench(Task(), plan).run(0, Silence())
    assert outcome.converted.overall == pytest.approx(outcome.before.overall, abs=1e-3)
    assert outcome.after["level weights alone"].overall > outcome.before.overall + 0.01
    assert outcome.after["all weights"].overall > outcome.after["staying linear"].overall + 0.02
