"""`python -m benchmarks.trial_planted` in small; the whole of it takes minutes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import trial_planted as planted


def test_rows_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(planted, "SEEDS", 2)
    monkeypatch.setattr(planted, "HELD_OUT", 2)
    file = tmp_path / "found.json"
    call = ["--runs", "1", "--tasks", "told", "--workers", "1", "--before", "2", "--steps", "2", "--device", "cpu"]
    threads = torch.get_num_threads()
    try:
        code = planted.main([*call, "--json", str(file)])
    finally:
        torch.set_num_threads(threads)
    rows = json.loads(file.read_text())["results"]
    assert [(row["task"], row["expected"]) for row in rows] == [("told", "convert")]
    assert code == int(not rows[0]["right"])
    assert {"stay", "level weights (linear)", "all weights (linear)"} <= set(rows[0]["arms"])
    assert f"told: {int(rows[0]['right'])} of 1 right" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("task", planted.TASKS)
def test_a_trial_tells_the_tasks_apart(task: str) -> None:
    threads = torch.get_num_threads()
    try:
        assert planted.main(["--runs", "1", "--workers", "1", "--tasks", task]) == 0
    finally:
        torch.set_num_threads(threads)
