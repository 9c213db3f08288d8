"""The pages of docs/ do not lie: their code runs and prints what they show, and the messages are those of the code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "recognition.md").read_text()
SOURCES = "".join(path.read_text() for path in sorted((ROOT / "passes").rglob("*.py")))


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_the_example_prints_what_the_page_shows(tmp_path: Path) -> None:
    (tmp_path / "example.py").write_text("\n".join(blocks("python")))
    done = subprocess.run(
        [sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "".join(blocks("text"))


def messages() -> list[str]:
    told = PAGE[PAGE.index("| note |") : PAGE.index("`options={")]
    quoted = re.findall(r"^\| `([^`]+)` \|", told, re.MULTILINE)
    rest = told[told.index("Other messages") :]
    return quoted + [" ".join(m.split()) for m in re.findall(r"`([^`]+)`", rest) if "=" not in m]


@pytest.mark.parametrize("message", messages())
def test_messages_are_those_of_the_code(message: str) -> None:
    """Up to the first number, which the code fills in."""
    fixed = re.split(r"\d|…", message.replace("w = 1", "w = one"))[0].replace("w = one", "w = 1").strip()
    assert fixed in SOURCES


def test_files_exist() -> None:
    named = re.findall(r"`((?:\.\./)?[a-z_]+\.py)`", PAGE)
    assert len(named) >= 8
    assert all((ROOT / "passes" / "structure" / name).resolve().is_file() for name in named)


def test_transforms_are_those_of_the_table() -> None:
    from llcompile.passes.structure.transforms import TRANSFORMS

    table = PAGE[PAGE.index("| held as |") : PAGE.index("A normalised form")]
    assert len(re.findall(r"^\| (?!held|-)", table, re.MULTILINE)) == len(TRANSFORMS)


def test_the_example_of_generation_runs(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "generation.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "example.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
