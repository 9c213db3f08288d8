"""The pages of docs/ do not lie: their code runs and prints what they show, and the messages are those of the code."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields
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


FAST = {"extending.md", "recognition.md", "generation.md"}
PAGES = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
WITH_CODE = [name for name, text in PAGES.items() if "```python" in text and name != "recognition.md"]


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in WITH_CODE])
def test_the_code_of_a_page_prints_what_the_page_shows(name: str, tmp_path: Path) -> None:
    """The page's blocks are one program; a block that starts with the name of a file is that file."""
    program = []
    for code in re.findall(r"^```python\n(.*?)^```", PAGES[name], re.MULTILINE | re.DOTALL):
        file = re.match(r"# (\w+\.py)\n", code)
        if file:
            (tmp_path / file[1]).write_text(code)
        else:
            program.append(code)
    (tmp_path / "example.py").write_text("\n".join(program))
    done = subprocess.run(
        [sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    shown = "".join(re.findall(r"^```text\n(.*?)^```", PAGES[name], re.MULTILINE | re.DOTALL))
    assert done.stdout == shown or not shown


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", PAGES[name])
    assert all((ROOT / "docs" / target).exists() for target in targets)
    files = re.findall(r"`((?:passes|patterns|kernels|tests|llcompile)/[\w/.]*)`", PAGES[name])
    assert all((ROOT / file).exists() for file in files)


def test_the_first_page_has_all_pages() -> None:
    assert {n for n in PAGES if n != "README.md"} == set(re.findall(r"\]\((\w[\w-]*\.md)\)", PAGES["README.md"]))


def test_every_error_and_warning_is_explained() -> None:
    from llcompile import errors

    classes = {
        n for n, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception | Warning)
    }
    explained = set(re.findall(r"`(\w+(?:Error|Warning))`", PAGES["troubleshooting.md"]))
    assert explained - {"UserWarning"} == classes


def test_options_are_those_of_the_code() -> None:
    from llcompile.options import Options

    named = re.findall(r"^\| `([a-z_]+)` \|", PAGES["options.md"], re.MULTILINE)
    assert named == [field.name for field in fields(Options)]
