"""Whole trials of tiny models: their records, their outputs, and what they refuse."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import llcompile
from llcompile.errors import TrialDataWarning, TrialError
from llcompile.trials import before, workers
from llcompile.trials.batches import as_batch
from llcompile.trials.result import Trial
from llcompile.trials.verdict import NOTHING
from llcompile.weights.level_kinds import KINDS
from tests.trials.models import LENGTH, LONGEST, VOCABULARY, WIDTH, Model, Recurrent, Softmax, batches, own_loss

QUICK: dict[str, Any] = {
    "steps": 3,
    "seeds": (0, 1),
    "held_out": 2,
    "inner": "eager",
    "device": "cpu",
    "progress": False,
}


def tried(model_fn: Any = Model, data: Any = batches, **settings: Any) -> Trial:
    return llcompile.trial(model_fn, data, **{**QUICK, **settings})


def unsteady(split: str, seed: int) -> Iterator[Tensor]:
    yield torch.randint(VOCABULARY, (4, LENGTH))


def same_for_both_splits(split: str, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randint(VOCABULARY, (4, LENGTH), generator=generator)


def others_held_out(split: str, seed: int) -> Iterator[dict[str, Tensor]]:
    for batch in batches(split, seed):
        yield batch if split == "train" else {name: x.flip(0) for name, x in batch.items()}


def broken(split: str, seed: int) -> Iterator[Tensor]:
    raise FileNotFoundError("part-0.bin")
    yield


def out_of_range(split: str, seed: int) -> Iterator[dict[str, Tensor]]:
    for number, batch in enumerate(batches(split, seed)):
        yield {"tokens": batch["tokens"] + (VOCABULARY if (split, number) == ("train", 2) else 0)}


class Placed(Model):
    """It has as many places as a training sequence has tokens."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) + torch.zeros(LENGTH, 1)[torch.arange(tokens.shape[1])]


def not_a_number() -> Model:
    model = Model()
    nn.init.constant_(model.head.bias, torch.nan)
    return model


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Trial:
    return tried(out=tmp_path_factory.mktemp("trial"))


def test_every_arm_is_tried_with_every_seed(small: Trial) -> None:
    kinds = [name for name in KINDS if name != "paper"]
    names = ["stay", *(f"level weights ({kind})" for kind in kinds), "all weights (linear)"]
    names += ["all weights (routed)"] if "routed" in kinds else []
    assert [row.arm for row in small.rows] == names
    assert all(set(seeds) == {0, 1} for seeds in small.records.values())
    assert "takes no state" in small.left_out["stay, state passing"]


def test_the_table_has_parameters_states_and_times(small: Trial) -> None:
    rows = {row.arm: row for row in small.rows}
    model = sum(p.numel() for p in Model().parameters())
    levels = math.ceil(math.log2(LONGEST)) + 1
    assert rows["stay"].trained == model
    assert rows["level weights (linear)"].trained == levels * (WIDTH + 1)
    assert rows["level weights (static)"].trained == levels
    assert rows["all weights (linear)"].trained == model + levels * (WIDTH + 1)
    assert rows["stay"].state_bytes == 4 * WIDTH**2
    assert rows["all weights (linear)"].state_bytes == 4 * WIDTH**2 * (1 + levels)
    assert all(row.step_ms > 0 and row.token_ms is not None and row.token_ms > 0 for row in rows.values())


def test_all_arms_start_from_the_same_and_go_elsewhere(small: Trial) -> None:
    runs = [record for seeds in small.records.values() for record in seeds.values()]
    before = [record.before.position.value("loss") for record in runs if record.before is not None]
    assert before == pytest.approx([before[0]] * len(runs), rel=1e-5)
    after = {record.judge.position.value("loss") for record in runs if record.judge is not None}
    assert len(after) == len(runs)
    assert all((record.reset is not None) == ("weights" in record.arm) for record in runs)


def test_gains_are_told_by_position_and_distance(small: Trial) -> None:
    assert [(g.low, g.high) for g in small.by_position][-1] == (LONGEST - 2, LONGEST - 1)
    assert [g.low >= LENGTH for g in small.by_position] == [False] * 4 + [True] * 4
    assert [g.low for g in small.by_distance] == [1, 2, 4, 8]
    row = next(row for row in small.rows if row.arm == small.verdict.arm)
    inside = small.by_position[:4]
    weighted = sum(g.gain.mean * g.labels for g in inside) / sum(g.labels for g in inside)
    assert row.gain is not None
    assert row.gain.mean == pytest.approx(weighted, rel=1e-6)


def test_what_can_be_written(small: Trial, tmp_path: Path) -> None:
    text = str(small)
    assert text.startswith(small.verdict.decision.split(":")[0])
    assert all(row.arm in text for row in small.rows)
    assert "1 of 1 linear-time mixers are log-linear" in text
    held = json.loads(small.to_json(tmp_path / "trial.json").read_text())
    assert held["verdict"]["decision"] == small.verdict.decision
    assert len(held["runs"]) == 2 * len(small.arms)
    page = small.to_html(tmp_path / "trial.html").read_text()
    assert small.verdict.decision in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert page.count('class="bar') == len(small.by_position) + len(small.by_distance)
    pytest.importorskip("matplotlib")
    assert small.to_plot(tmp_path / "trial.png").read_bytes()[:4] == b"\x89PNG"


def no_run(*_: Any) -> None:
    raise AssertionError("a finished run was run again")


def test_a_second_start_goes_on(small: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    assert small.folder is not None
    before = {path: path.stat().st_mtime_ns for path in (small.folder / "runs").iterdir()}
    monkeypatch.setattr(workers, "run_arm", no_run)
    again = tried(out=small.folder)
    assert again.verdict == small.verdict
    next(iter(before)).unlink()
    with pytest.raises(AssertionError, match="run again"):
        tried(out=small.folder)
    monkeypatch.undo()
    assert tried(out=small.folder).verdict == small.verdict  # with the same seed it gives the same numbers
    now = {path: path.stat().st_mtime_ns for path in (small.folder / "runs").iterdir()}
    assert sum(now[path] != before[path] for path in before) == 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": 4}, "holds runs of another trial: steps was 3 and is 4 now"),
        ({"model_fn": partial(Model, seed=1)}, "holds runs of another trial: checkpoint was"),
        ({"data": torch.zeros(100, 128, dtype=torch.long)}, "trial: training batch was"),
        ({"data": others_held_out}, "trial: held-out batches was"),
    ],
    ids=["steps", "model", "data", "held out"],
)
def test_another_trial_in_the_same_folder(small: Trial, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(TrialError, match=message):
        tried(out=small.folder, **changed)


@pytest.mark.parametrize("name", ["config.json", "checkpoint.pt", "runs/stay-0.001-seed-0.json"])
def test_a_file_of_a_trial_that_is_damaged(small: Trial, tmp_path: Path, name: str) -> None:
    assert small.folder is not None
    folder = Path(shutil.copytree(small.folder, tmp_path / "copy"))
    (folder / name).write_bytes((folder / name).read_bytes()[:40])
    with pytest.raises(TrialError, match=rf"{name} of this trial cannot be read"):
        tried(out=folder)


def test_progress_shows_what_is_judged(small: Trial, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert small.folder is not None
    folder = Path(shutil.copytree(small.folder, tmp_path / "copy"))
    (folder / "runs" / "stay-0.001-seed-0.json").unlink()
    again = tried(out=folder, progress=True)
    record = again.records["stay"][0].judge
    assert record is not None
    assert f"stay, seed 0: loss {record.position.value('loss', again.bins['inside']):.4f} (" in capsys.readouterr().err
    assert record.position.value("loss") != pytest.approx(record.position.value("loss", again.bins["inside"]), abs=1e-3)


def test_a_model_without_a_mixer_is_not_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "run_arm", no_run)
    found = tried(lambda: Model(Softmax))
    assert found.verdict.decision == NOTHING
    assert found.rows == ()
    assert "softmax attention" in str(found)


class Explodes(Model):
    """Its loss is no number once its weights have moved."""

    def forward(self, tokens: Tensor) -> Tensor:
        moved = (self.head.bias - self.start).abs().sum()
        return super().forward(tokens) + torch.where(moved > 0, torch.nan, 0.0)

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("start", self.head.bias.detach().clone())


def test_a_run_that_diverges_is_shown_and_not_averaged() -> None:
    found = tried(Explodes, kinds=("static",))
    rows = {row.arm: row for row in found.rows}
    assert rows["stay"].diverged == (0, 1)
    assert (rows["stay"].loss, rows["stay"].gain) == (None, None)
    assert rows["level weights (static)"].diverged == ()
    assert found.verdict.decision == "not decided: more seeds"
    assert "every control diverged" in found.verdict.why
    assert "diverged with seed 0, 1" in str(found)
    assert found.records["stay"][0].diverged == 2


def test_state_passing_is_tried_where_it_can_be() -> None:
    class Both(Recurrent):
        def __init__(self) -> None:
            super().__init__()
            self.mixer = Model().mixer

        def forward(self, tokens: Tensor, initial_state: Any = None, return_state: bool = False) -> Any:
            if return_state:
                x = self.embed(tokens)
                q, k, v = self.mixer.qkv(x).chunk(3, -1)
                past = k.transpose(-1, -2) @ v
                first = torch.zeros_like(past) if initial_state is None else initial_state
                return self.head(x + (q @ k.transpose(-1, -2)).tril() @ v + q @ first), first + past
            x = self.embed(tokens)
            return self.head(x + self.mixer(x))

    found = tried(Both, kinds=("static",))
    assert [row.arm for row in found.rows][:2] == ["stay", "stay, state passing"]
    assert found.left_out == {}
    stay, passing = (found.records[row.arm][0].judge for row in found.rows[:2])
    assert stay != passing


def test_a_loss_of_the_users_own() -> None:
    found = tried(loss=own_loss, kinds=("static",))
    assert all(row.loss is not None and row.accuracy is None for row in found.rows)
    assert len(found.by_position) == 1
    assert "its loss is your own" in found.left_out["stay, state passing"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seeds": (1,)}, "at least 2 different seeds for an interval"),
        ({"seeds": (1, 1)}, "at least 2 different seeds for an interval"),
        ({"stepz": 3}, "no setting 'stepz'; known: steps"),
        ({"kinds": ("cubic",)}, "kinds: unknown 'cubic'"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"rates": (0.0,)}, "rates must be positive"),
        ({"metric": "bleu"}, "metric: unknown 'bleu'"),
        ({"model_fn": lambda: 3}, r"model_fn\(\) gave a int"),
        ({"model_fn": partial(nn.Embedding, 3, 3)}, "the model does not run on the first training batch"),
        ({"model_fn": partial(nn.Embedding, VOCABULARY, VOCABULARY - 1)}, "with a larger vocabulary"),
        ({"model_fn": nn.Flatten}, r"the model returned a tensor \[4, 8\]; expected logits"),
        ({"loss": lambda model, batch: model(batch.tokens)}, r"expected a tensor with one number"),
        ({"loss": own_loss, "held_out": 1}, "2 or more held-out batches are needed"),
        ({"data": 3}, "batches is a int"),
        ({"data": unsteady}, "gives other batches at each call"),
        (
            {"data": torch.zeros(40, LENGTH, dtype=torch.long), "batch": 4, "length": LENGTH, "part": "beyond"},
            "no held-out",
        ),
        ({"data": lambda split, seed: None}, r"batches\('train', 0\) raised TypeError"),
        ({"data": broken}, r"raised FileNotFoundError: part-0.bin \(.*test_trial.py:\d+ in broken\)"),
        (
            {"model_fn": Placed},
            r"does not run on the first held-out batch, on tokens \[4, 16\] from \d+ to \d+: .*--held-length",
        ),
        ({"model_fn": not_a_number}, r"loss on the first training batch \[4, 8\] is nan before it is trained"),
    ],
    ids=lambda x: x if isinstance(x, str) else "-".join(x),
)
def test_what_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(TrialError, match=message):
        tried(**changed)


def test_data_that_ignore_the_split_are_named() -> None:
    """Seed 0 would be judged on what it was trained on; the same data with a split of its own are not."""
    train, held = (as_batch(next(same_for_both_splits(split, 0)), split) for split in ("train", "held out"))
    with pytest.warns(TrialDataWarning, match=r"training batch of seed 0.*give sequences that no training has"):
        before.warn_of_splits(train, held)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before.warn_of_splits(train, as_batch(next(same_for_both_splits("held out", 1)), "held out"))


def test_a_batch_that_the_model_cannot_read_is_named() -> None:
    where = r"step 3 of 'stay' with seed 0, on tokens \[4, 8\] from 1\d to 2\d: IndexError: .* in embedding\)"
    with pytest.raises(TrialError, match=where):
        tried(data=out_of_range)


def test_a_converted_model_is_refused(fresh_dynamo: None) -> None:
    model = Model()
    llcompile.convert(model, torch.zeros(2, 8, dtype=torch.long), verify=False)
    with pytest.raises(TrialError, match="gave a model that is converted"):
        tried(lambda: model)


@pytest.mark.slow
def test_several_workers_give_the_same(small: Trial) -> None:
    assert tried(workers=2).verdict.gain == small.verdict.gain
    with pytest.raises(TrialError, match="go to other processes"):
        tried(lambda: Model(), workers=2)
