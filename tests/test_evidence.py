"""The experiments of docs/evidence.md: their tasks are what they say, typeseg's module is typeseg, `show` works."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from benchmarks.evidence import __main__ as command
from benchmarks.evidence import files, language, mqar, needles, pool, recall, show, store, tables, training, typeseg
from benchmarks.evidence.worker import Job
from llcompile.errors import BenchError
from typeseg_torch import weights


def drawn(task: mqar.Task, count: int = 32) -> mqar.Batch:
    return task.draw(count, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("told", [False, True], ids=["untold", "told"])
@pytest.mark.parametrize("layout", ["first", "stream"])
def test_each_query_has_its_pair_at_its_distance(layout: str, told: bool) -> None:
    task = mqar.Task(length=64, pairs=12, vocabulary=256, layout=layout, told=told)
    batch = drawn(task)
    found = 0
    for tokens, places, answers, octaves in zip(*batch, strict=True):
        for place, answer, octave in zip(places.tolist(), answers.tolist(), octaves.tolist(), strict=True):
            if answer < 0:
                assert layout == "stream"
                continue
            pairs = [s for s in range(0, place, 2) if tokens[s] == tokens[place] and tokens[s + 1] == answer]
            assert any((place - s) // 2 in range(2**octave, 2 ** (octave + 1)) for s in pairs)
            if told:
                assert (int(tokens[place]) - 1) % task.octaves == octave
            found += 1
    assert found > 32 * 12 // 2


def test_zoologys_layout() -> None:
    """Pairs first, keys of the lower half and values of the upper one, none twice, and near queries more often."""
    task = mqar.Task(length=128, pairs=8, vocabulary=512)
    tokens, places, answers, _ = drawn(task, 256)
    keys, values = tokens[:, 0:16:2], tokens[:, 1:16:2]
    assert ((keys > 0) & (keys < 256)).all()
    assert (values >= 256).all()
    assert all(len(set(row.tolist())) == 8 for row in (*keys, *values))
    assert (tokens.gather(1, places) == keys).all()
    assert (answers == values).all()
    gaps = (places - 16) // 2
    assert ((gaps >= 0) & (gaps < 56)).all()
    assert all(len(set(row.tolist())) == 8 for row in gaps)
    assert (gaps == 0).sum() > 3 * (gaps == 28).sum() > 0


@pytest.mark.parametrize(("length", "pairs"), [(64, 4), (128, 8), (256, 16), (256, 64), (1024, 256)])
def test_published_sizes_have_all_pairs_in_one_bucket(length: int, pairs: int) -> None:
    """What docs/evidence.md says of them; with other numbers of pairs there are several buckets."""
    levels = [{(t ^ s).bit_length() for s in range(2 * pairs)} for t in range(2 * pairs, length)]
    assert all(len(found) == 1 for found in levels)
    assert any(len({(t ^ s).bit_length() for s in range(3 * pairs)}) > 1 for t in range(3 * pairs, length))


def test_keys_tell_distances_only_where_they_are_told() -> None:
    untold = drawn(mqar.Task(length=64, pairs=12, vocabulary=256, layout="stream"), 64)
    keys = untold.tokens.gather(1, untold.places)
    told = ((keys - 1) % 5 == untold.octaves)[untold.answers >= 0].double().mean()
    assert told < 0.4


@pytest.mark.parametrize("name", needles.TASKS)
def test_a_needle_is_in_the_text_before_its_question(name: str) -> None:
    corpus = needles.Corpus([b"def f(x):\n    return x\n" * 40, b"import os\n" * 90], "cpu")
    task = needles.TASKS[name]
    exam = needles.asked(corpus, task, 6, 400, torch.Generator().manual_seed(0))
    for tokens, mask in zip(*exam, strict=True):
        text, value = bytes(tokens.tolist()), bytes(tokens[mask].tolist())
        word = text[-task.digits - 7 : -task.digits - 3]
        assert text.endswith(b"# key %s ? %s" % (word, value))
        assert len(value) == task.digits
        assert text.count(b"# key %s = %s\n" % (word, value)) == 1
        assert text.count(b" = ") == task.count


def test_planted_texts_keep_their_length_and_share() -> None:
    corpus = needles.Corpus([b"x = 1\n" * 200], "cpu")
    generator = torch.Generator().manual_seed(0)
    windows = corpus.windows(8, 300, generator)
    before = windows.clone()
    after = needles.planted(corpus, windows, 0.25, generator)
    assert after.shape == (8, 300)
    assert (after == before).all(1).sum() == 6
    assert bytes(after[0].tolist()).count(b"# key ") == 8


def test_files_of_training_are_not_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(40):
        (tmp_path / f"f{number}.py").write_text(f"value = {number}\n" * 50)
    (tmp_path / "wide.py").write_text("x" * 500)
    monkeypatch.setattr(files, "roots", lambda: [tmp_path])
    train, held = (set(files.Files(("python", "css"), out, 100).texts["python"]) for out in (False, True))
    assert len(train) + len(held) == 40
    assert not train & held
    assert held


def test_documents_have_the_types_of_their_files(monkeypatch: pytest.MonkeyPatch) -> None:
    class Two:
        texts: ClassVar = {"python": [b"p" * 500], "css": [b"c" * 500]}

    monkeypatch.setattr(typeseg, "Files", lambda *given: Two)
    tokens, labels = typeseg.Documents(typeseg.SMALL, ["css", "python"], True).draw(3, torch.Generator().manual_seed(0))
    assert tokens.shape == labels.shape == (3, typeseg.SMALL.length)
    assert ((tokens == ord("p")) == (labels == 1)).all()
    assert 0 < labels.double().mean() < 1


@pytest.mark.skipif(not weights.available(), reason="neither typeseg nor its wheel is here")
def test_the_module_is_typesegs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same probabilities as the package's own code in numpy, and other ones for another text."""
    pytest.importorskip("transformers")
    from typeseg_torch.model import encode, pretrained

    monkeypatch.setenv("TYPESEG_BACKEND", "numpy")
    if wheel := weights.wheel():
        monkeypatch.syspath_prepend(str(wheel))
    package: Any = pytest.importorskip("typeseg")
    text = "<div>hi</div>\n.btn { color: red; }\nSELECT 1;\tend"
    theirs = torch.from_numpy(package.precise(text).char_probs)
    model, labels = pretrained()
    with torch.no_grad():
        ours = model(encode(text)[None])[0].softmax(-1)
        other = model(encode(text[::-1])[None])[0].softmax(-1)
    assert labels == package.precise(text).labels
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (other - theirs).abs().max() > 0.1


def test_without_typeseg_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llcompile.errors import SpecError

    monkeypatch.setattr(weights, "_installed", lambda: None)
    monkeypatch.setenv(weights.VARIABLE, str(tmp_path / "no.whl"))
    with pytest.raises(SpecError, match="pip install typeseg"):
        weights.read()


def test_a_store_goes_on_where_it_was(tmp_path: Path) -> None:
    first = store.Store(tmp_path, "a", {"steps": 3}, "cpu")
    first.put("x", 1)
    assert store.Store(tmp_path, "a", {"steps": 3}, "cpu")["x"] == 1
    assert "x" not in store.Store(tmp_path, "a", {"steps": 4}, "cpu")


def test_processes_end_when_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """One share ends, one fails, one is stopped, and one is not begun; a failure says why."""
    scripts = {"good": "pass", "bad": "raise SystemExit('no luck')", "slow": "import time; time.sleep(60)"}

    def start(order: pool.Order, share: str, deadline: float) -> Any:
        import subprocess

        with open(order.folder / f"{share}.log", "wb") as log:
            return subprocess.Popen([sys.executable, "-c", scripts[share]], stdout=log, stderr=log)

    monkeypatch.setattr(pool, "_start", start)
    monkeypatch.setattr(pool, "_GRACE", 0.0)
    order = pool.Order("recall", tmp_path, 6 / 60, 1, "cpu", True)
    started = time.time()
    assert pool.run(order, ["good", "bad", "slow", "late"]) <= 1
    shown = capsys.readouterr().out
    assert "good: done" in shown
    assert "no luck" in shown
    assert "slow: stopped" in shown
    assert time.time() - started < 30


def result(accuracy: float, **more: Any) -> dict[str, Any]:
    return {"accuracy": accuracy, "by_octave": [accuracy, None], "by_position": [accuracy, accuracy], **more}


def planted_results(folder: Path) -> None:
    """Files like those of the experiments: `routed` gains 6 points with two seeds, all else nothing."""
    for seed in (0, 1):
        arms = {arm.name: 0.56 if arm.name == "all, routed" else 0.5 for arm in training.ARMS}
        kept = store.Store(folder / "recall", f"mamba2-{seed}", {"family": "mamba2"}, "cpu")
        for name, accuracy in {"trained": 0.4, **arms}.items():
            kept.put(f"stream, untold: {name}", result(accuracy + seed / 100))
        kept = store.Store(folder / "typeseg", f"seed-{seed}", {}, "cpu")
        for name in (typeseg.AS_IT_IS, *typeseg.ORDER):
            kept.put(name, result(0.8, types=["python"]))
    plan = {"family": "gdn", "tokens": 8, "length": 64, "more": 2, "questions": [64]}
    kept = store.Store(folder / "language", "gdn", plan, "cpu")
    answers = {task: {"64": {"answers": 0.25, "bytes": 0.5}} for task in needles.TASKS}
    kept.put(
        "trained", {"ends": [64, 128], "loss": [2.0, 3.0], "needles": answers, "parameters": 9, "steps": 1, "bytes": 5}
    )
    kept.put(language.WAYS[0].arm.name, {"loss": [2.0, 2.5], "needles": answers})


def test_show_fills_the_page(tmp_path: Path, capsys: Any) -> None:
    """The real page with planted results: tables, the verdict, and pictures."""
    pytest.importorskip("matplotlib")
    planted_results(tmp_path)
    page = tmp_path / "evidence.md"
    page.write_text(show.PAGE.read_text())
    show.show(tmp_path, page)
    text = page.read_text()
    assert "| stream, untold | scalar decay (Mamba2ForCausalLM) | 0.405 | 0.505 | +0.0" in text
    assert "`routed` gains 5 points over staying linear with 2 of 2 seeds" in text
    assert "| staying, long texts | 2.0000 | 2.5000 |" in text
    assert "| trained | single-1 | 25 (50) |" in text
    assert {file.name for file in (tmp_path / "pictures").iterdir()} == {
        f"evidence-{name}.png" for name in ("recall", "typeseg", "language")
    }
    show.show(tmp_path, page)  # once more, in its own page
    assert page.read_text() == text
    assert "+6.0" in capsys.readouterr().out


@pytest.mark.parametrize("layout", ["stream", "first"])
def test_no_training_sees_what_is_held_out(layout: str) -> None:
    """Of the seed of the held-out sequences a CPU's generator keeps 32 bits, which are those of a training seed."""
    plan = recall.LARGE
    task = dataclasses.replace(plan.task, layout=layout)
    held = {tuple(row) for row in recall.held_out(task, plan.tests, "cpu").tokens.tolist()}
    assert len(held) == plan.tests
    for seed in (0, 1):
        batches = recall.stream(task, plan.batch, torch.Generator().manual_seed(seed))
        seen = {tuple(row) for _, batch in zip(range(40), batches, strict=False) for row in batch.tokens.tolist()}
        assert len(seen) == 40 * plan.batch
        assert not held & seen


def test_each_machine_says_what_it_ran() -> None:
    """One machine has a line without names; two have a line each, with the series that ran there."""
    here, there = ({"machine": name, "date": "2026-11-27T10:00", "versions": {"torch": "2"}} for name in ("a", "b"))
    files = [{"share": share, "environment": here} for share in ("gdn-0", "gdn-1")]
    assert show._where(files) == "\n\n(a; 2026-11-27; torch 2.)"
    later = {**there, "date": "2026-11-28T01:00"}
    files += [{"share": "gdn_longer-0", "environment": there}, {"share": "mamba2", "environment": later}]
    assert show._where(files) == (
        "\n\n(gdn: a; 2026-11-27; torch 2.)\n\n(gdn_longer, mamba2: b; 2026-11-27 to 2026-11-28; torch 2.)"
    )


def test_show_wants_its_marks(tmp_path: Path) -> None:
    page = tmp_path / "evidence.md"
    page.write_text("<!-- recall -->\n\n<!-- end -->\n")
    with pytest.raises(BenchError, match="marks"):
        show.show(tmp_path, page)


def test_an_interval_is_students() -> None:
    """Two differences of 1 and 3 points: 2 ± 12.7."""
    assert tables.gain([(0.5, 0.51), (0.5, 0.53)]) == "+2.0 ± 12.7 (2 of 2)"


def test_the_command_starts_the_shares_of_an_experiment(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(pool, "run", lambda order, shares: given.append((order, shares)) or 0)
    assert command.main(["language", "--minutes", "2", "--small"]) == 0
    assert given[0][0].small
    assert given[0][0].folder.name == "language"
    assert given[0][1] == ["mamba2", "gdn"]
    series = ["mamba2-0", "gdn-0", "gdn_longer-0", "mamba2_longer-0"]
    assert recall.shares(small=False)[:5] == [*series, "mamba2-1"]
    assert json.dumps(typeseg.shares(small=False)) == '["seed-0", "seed-1", "seed-2", "seed-3", "seed-4"]'


@pytest.mark.slow
def test_recall_converts_trains_and_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_dynamo: None
) -> None:
    """The outputs do not move at conversion, level weights change them after it, and a second run finds its results."""
    pytest.importorskip("transformers")
    short = dataclasses.replace(recall.SERIES["mamba2"], tasks=(("stream", False),), arms=training.ARMS[:2])
    monkeypatch.setattr(recall, "SERIES", {"mamba2": short})
    losses: list[list[float]] = []
    score = recall.score
    monkeypatch.setattr(recall, "score", lambda x, *rest: losses.append(x.flatten().tolist()) or score(x, *rest))
    job = Job("recall", "mamba2-0", tmp_path, "cpu", True, time.time() + 600)
    recall.work(job)
    found = json.loads((tmp_path / "mamba2-0.json").read_text())["results"]
    assert list(found) == ["stream, untold: trained", "stream, untold: staying", "stream, untold: linear alone"]
    assert found["stream, untold: linear alone"]["moved_at_conversion"] < 1e-4
    trained, put_back = losses[-2:]
    assert max(abs(a - b) for a, b in zip(trained, put_back, strict=True)) > 1e-3
    before = len(losses)
    recall.work(job)
    assert len(losses) == before
