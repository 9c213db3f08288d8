"""`python -m benchmarks.selective` at a tiny size: every row, and the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import selective


def test_rows_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Each mixer runs in both forms and both passes; transformers' scan computes what ours does."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(selective, "CHANNELS", 64)
    threads = torch.get_num_threads()
    try:
        assert selective.main(["--lengths", "9", "--turns", "1", "--json", str(tmp_path / "found.json")]) == 0
    finally:
        torch.set_num_threads(threads)
    rows = json.loads((tmp_path / "found.json").read_text())["results"]
    names = {
        f"{mixer}, {form}" for mixer in ("Mamba-1", "delta rule", "erase key") for form in ("linear", "log-linear")
    }
    assert {row["what"] for row in rows} == names | {"Mamba-1, transformers"}
    assert len(rows) == 14
    shown = capsys.readouterr().out
    assert all(row["seconds"] > 0 and row["what"] in shown for row in rows)


def test_the_peer_computes_the_same() -> None:
    """The times are of one and the same function."""
    pytest.importorskip("transformers")
    x, _ = selective.scan(11, "cpu", torch.float32)
    step = -x["log_decay"].unsqueeze(-1)
    ours = selective.loglinear_attention(level_weights=None, **{**x, "v": x["v"] * step})[0].squeeze(-1).transpose(1, 2)
    torch.testing.assert_close(selective.transformers_scan(**x), ours, rtol=1e-4, atol=1e-4)
