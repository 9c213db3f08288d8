"""`python -m benchmarks.routed`: rows, the file, and what it refuses; a routed token is what two calls are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import routed
from llcompile.errors import BenchError


def test_rows_and_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each chosen mixer, length and call has a row; the exit code says whether the budget is kept."""
    threads = torch.get_num_threads()
    try:
        code = routed.main(
            ["--mixers", "small", "--lengths", "9", "--turns", "2", "--json", str(tmp_path / "found.json")]
        )
    finally:
        torch.set_num_threads(threads)
    found = json.loads((tmp_path / "found.json").read_text())
    assert not found["graph"]
    assert [(row["mixer"], row["what"]) for row in found["results"]] == [
        (f"small {mixer}", what) for mixer in ("Mamba-2", "gated delta") for what in ("forward", "both", "token")
    ]
    assert all(0 < row["low"] <= row["ratio"] <= row["high"] and row["seconds"] > 0 for row in found["results"])
    assert code == int(any(row["ratio"] > routed.BUDGET for row in found["results"]))
    shown = capsys.readouterr().out
    assert shown.count("the budget of 1.3") == len(found["results"])


@pytest.mark.parametrize(
    ("given", "expected"),
    [(["--mixers", "RWKV"], "is part of no name of small Mamba-2"), (["--graph"], "pass --device cuda too")],
)
def test_refused(given: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A name that is none, and a CUDA graph without a CUDA device."""
    with pytest.raises(SystemExit) as caught:
        routed.main(given)
    assert caught.value.code == 2
    assert expected in capsys.readouterr().err


def test_what_cannot_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said, and not timed otherwise without a word."""
    monkeypatch.setattr(routed, "as_graph", lambda call: (call, "RuntimeError: it waits"))
    with pytest.raises(BenchError, match=r"it waits\); run without --graph"):
        routed.graphed(lambda: None)
    monkeypatch.setattr(routed, "as_graph", lambda call: (call, None))
    assert routed.graphed(len) is len


def test_a_token_goes_through_both_calls() -> None:
    """The state that comes out holds the token's routing key, and the readouts are those of its buckets."""
    plain, whole = routed.calls(routed.MIXERS["small gated delta"], 9, 4, "cpu")["token"]
    o, _ = plain()
    readouts, (routed_o, state) = whole()
    assert torch.equal(o, routed_o)
    assert readouts.shape == (1, 4, routed.LEVELS)
    assert state.flatten(3)[:, :, 0, 8:].abs().max() > 0
