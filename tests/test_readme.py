"""The README does not lie: its code runs as written, and what it names exists."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from llcompile.cli import COMMANDS
from llcompile.options import Options

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_example_runs(number: int, tmp_path: Path) -> None:
    code = BLOCKS[number]
    if "transformers" in code:
        pytest.importorskip("transformers")
    (tmp_path / "example.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr


def test_there_are_examples() -> None:
    assert len(BLOCKS) >= 3


def test_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z]+)\b", " ".join(re.findall(r"^    .*|`[^`]*`", README, re.MULTILINE))))
    assert {"demo", "test"} <= named <= targets


def test_commands_exist() -> None:
    assert set(re.findall(r"`llcompile ([a-z]+)", README)) == {command.name for command in COMMANDS}


def test_folders_exist() -> None:
    folders = re.findall(r"^\| `([a-z]+)/` \|", README, re.MULTILINE)
    assert len(folders) >= 6
    assert all((ROOT / folder).is_dir() for folder in folders)


def test_options_are_the_ones_there_are() -> None:
    table = README[README.index("## Options of the backend") : README.index("## The folders")]
    assert re.findall(r"^\| `([a-z_]+)` \|", table, re.MULTILINE) == [field.name for field in fields(Options)]
