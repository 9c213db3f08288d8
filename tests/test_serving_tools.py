"""What people run to serve and to measure serving: `llcompile bench decode` and examples/generate.py."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import decode
from llcompile.commands import cli

ROOT = Path(__file__).parent.parent
SIZES = decode.Sizes(batch=2, heads=2, key_dim=4, value_dim=8)


def test_bytes_grow_with_the_logarithm() -> None:
    """A doubled context is one more level; the linear state stays, and the softmax cache doubles."""
    contexts = [1 << 10, 1 << 11, 1 << 12]
    found = [decode.measure(f, c, SIZES, "cpu", 1) for c in contexts for f in decode.FORMS]
    held = {form: [r["bytes"] for r in found if r["form"] == form] for form in decode.FORMS}
    state = 4 * 2 * 4 * 8
    assert held["linear"] == [state] * 3
    # A header, and ceil(log2(context + 1)) + 1 levels.
    assert held["log-linear"] == [state * (1 + 12), state * (1 + 13), state * (1 + 14)]
    assert held["softmax"] == [4 * 2 * (4 + 8) * context for context in contexts]
    growth = decode.growth(found)
    assert growth["log-linear"]["bytes_per_doubling"] == pytest.approx(state)
    assert growth["linear"]["bytes_per_doubling"] == 0


def test_the_command_writes_what_it_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "decode.json"
    assert cli.main(["bench", "decode", "--quick", "--heads", "2", "--output", str(file)]) == 0
    record = json.loads(file.read_text())
    assert {r["form"] for r in record["results"]} == set(decode.FORMS)
    assert "per doubling" in capsys.readouterr().out
    assert file.with_suffix(".png").is_file()


Generate = Callable[..., None]


@pytest.fixture
def generate(monkeypatch: pytest.MonkeyPatch, fresh_dynamo: None) -> Generate:
    """Run the example as a script, in this process."""

    def run(*arguments: str) -> None:
        file = str(ROOT / "examples" / "generate.py")
        monkeypatch.setattr(sys, "argv", [file, *arguments])
        runpy.run_path(file, run_name="__main__")

    return run


def test_the_example_streams(generate: Generate, capsys: pytest.CaptureFixture[str]) -> None:
    """Without any file beside it; `make test-all` runs it on a fresh clone."""
    generate("mamba2", "--tokens", "5", "--prompt-length", "20", "--inner", "eager")
    shown = capsys.readouterr().out
    assert "2 of 2 linear-time mixers are log-linear" in shown
    assert "[B, H, 1 + levels, K, V]" in shown
    assert "[5/5 tokens" in shown
    assert float(shown.split("noise on them moves the logits by ")[1]) > 0.01


def test_the_example_names_what_it_knows(generate: Generate, tmp_path: Path) -> None:
    zoo = tmp_path / "zoo.json"
    zoo.write_text(json.dumps({"mine": {"kwargs": {}}}))
    with pytest.raises(SystemExit, match=r"'mamba3' is neither one of mamba2, qwen3_next, mine nor a \.json file"):
        generate("mamba3", "--zoo", str(zoo))


def first_lines() -> list[str]:
    """The commands at the start of each example's docstring."""
    commands = []
    for file in sorted((ROOT / "examples").glob("*.py")):
        told = [line for line in file.read_text().split('"""')[1].splitlines() if line.startswith("python ")]
        assert told, file
        assert all(line.startswith(f"python examples/{file.name} ") for line in told)
        commands += told
    return commands


@pytest.mark.slow
@pytest.mark.parametrize("command", first_lines())
def test_an_example_runs_as_its_first_lines_say(command: str, tmp_path: Path) -> None:
    """Beside nothing but the other examples, as on a fresh clone; each says what shows that level weights act."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    run = [sys.executable, *command.split()[1:]]
    done = subprocess.run(run, capture_output=True, text=True, timeout=1800, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "linear-time mixers are log-linear" in done.stdout
    assert re.search(r"the level weights(, and nothing else, moved| act)", done.stdout, re.IGNORECASE)
