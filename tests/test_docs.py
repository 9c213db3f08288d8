"""The pages of docs/ do not lie: their code runs and prints what they show, and the messages are those of the code."""

from __future__ import annotations

import argparse
import importlib
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "recognition.md").read_text()
SOURCES = "".join(path.read_text() for path in sorted((ROOT / "patterns").rglob("*.py")))


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_the_example_prints_what_the_page_shows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fresh_dynamo: None
) -> None:
    (tmp_path / "example.py").write_text("\n".join(blocks("python")))
    runpy.run_path(str(tmp_path / "example.py"), run_name="__main__")
    assert capsys.readouterr().out == "".join(blocks("text"))


def messages() -> list[str]:
    told = PAGE[PAGE.index("| note |") : PAGE.index("`options={")]
    quoted = re.findall(r"^\| `([^`]+)` \|", told, re.MULTILINE)
    rest = told[told.index("Most values of a model") :]
    return quoted + [" ".join(m.split()) for m in re.findall(r"`([^`]+)`", rest) if "=" not in m]


@pytest.mark.parametrize("message", messages())
def test_messages_are_those_of_the_code(message: str) -> None:
    """Up to the first number, which the code fills in."""
    fixed = re.split(r"\d|…", message.replace("w = 1", "w = one"))[0].replace("w = one", "w = 1").strip()
    assert fixed in SOURCES


def test_files_exist() -> None:
    named = re.findall(r"`([a-z_]+\.py)`", PAGE)
    assert len(named) >= 8
    assert all((ROOT / "patterns" / "structure" / name).is_file() for name in named)


def test_transforms_are_those_of_the_table() -> None:
    from llcompile.patterns.structure.transforms import TRANSFORMS

    table = PAGE[PAGE.index("| held as |") : PAGE.index("A normalised form")]
    assert len(re.findall(r"^\| (?!held|-)", table, re.MULTILINE)) == len(TRANSFORMS)


# What generation.md shows is what tests/models/test_padding.py and test_generate.py test in `make test`.
FAST = {"extending.md", "recognition.md"}
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


def link_targets(text: str) -> set[str]:
    """Every file that a page links to, without the part of it; links out of the repository aside."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return {target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", prose) if "://" not in target} - {""}


WRITTEN = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    missing = [target for target in link_targets(text) if not (page.parent / target).exists()]
    files = re.findall(r"`((?:passes|patterns|kernels|tests|llcompile|docs|examples|benchmarks)/[\w/.-]*)`", text)
    missing += [file for file in files if not (ROOT / file).exists()]
    assert not missing


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_a_part_of_a_page_name_a_heading(page: Path) -> None:
    for target, part in re.findall(r"\]\(([^)\s#:]*)#([^)\s]+)\)", page.read_text()):
        other = (page.parent / target).read_text() if target else page.read_text()
        headings = re.findall(r"^#+ (.+)", other, re.MULTILINE)
        assert part in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_every_page_can_be_reached_from_the_first() -> None:
    reached: set[Path] = set()
    todo = [ROOT / "docs" / "README.md"]
    while todo:
        page = todo.pop()
        if page not in reached and page.suffix == ".md":
            reached.add(page)
            todo += [(page.parent / target).resolve() for target in link_targets(page.read_text())]
    assert set((ROOT / "docs").rglob("*.md")) <= reached


def test_pictures_are_shown() -> None:
    shown = link_targets((ROOT / "README.md").read_text())
    pictures = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs" / "pictures").glob("*.svg")}
    assert pictures
    assert pictures <= shown


def test_the_first_page_has_all_pages() -> None:
    assert {n for n in PAGES if n != "README.md"} == set(re.findall(r"\]\((\w[\w-]*\.md)\)", PAGES["README.md"]))


def test_every_decision_is_listed() -> None:
    folder = ROOT / "docs" / "decisions"
    listed = set(re.findall(r"\]\(([\w-]+\.md)\)", (folder / "README.md").read_text()))
    pages = {page.name: page.read_text() for page in folder.glob("*.md") if page.name != "README.md"}
    assert listed == set(pages)
    for text in pages.values():
        assert all(word in text for word in ("**Decision.**", "**Rejected.**", "**Consequences.**"))


def test_commands_are_those_of_the_code() -> None:
    from llcompile.commands.cli import COMMANDS

    named = re.findall(r"^\| `llcompile (\w+)", PAGES["command-line.md"], re.MULTILINE)
    assert set(named) == {command.name for command in COMMANDS}


USED = [*WRITTEN, *sorted((ROOT / ".github").rglob("*.yml"))]
# A command with at least one argument, in a code span or in an indented line.
CALLS = sorted(
    {
        (words[0], words[1] if words[0] in ("bench", "kernels") else "", option)
        for page in USED
        for line in re.findall(r"`llcompile ([^`\n]+)`|^    llcompile (.+)", page.read_text(), re.MULTILINE)
        for words in [("".join(line).partition("#")[0]).split()]
        for option in words
        if option.startswith("--") and words[0].islower()
    }
)


@pytest.mark.parametrize(("command", "kind", "option"), CALLS, ids=" ".join)
def test_options_of_commands_exist(command: str, kind: str, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    from llcompile.commands import cli

    assert cli.main([command, *([kind] if kind else []), "--help"]) == 0
    assert re.search(rf"{option}\b", capsys.readouterr().out)


def test_a_bug_report_asks_for_what_the_tools_write() -> None:
    text = (ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text()
    assert "llcompile doctor --json" in text
    assert "llcompile repro" in text
    assert {("doctor", "", "--json"), ("repro", "", "--mixer")} <= set(CALLS)


def test_public_names_are_listed() -> None:
    import llcompile
    from llcompile import ops

    listed = re.findall(r"`llcompile\.([\w.]+)`", PAGES["public-api.md"])
    assert {name for name in llcompile.__all__ if name != "__version__"} <= set(listed)
    assert {f"ops.{name}" for name in ops.__all__} <= set(listed)


def test_the_picture_of_passes_is_the_pipeline() -> None:
    from llcompile.passes import pipeline

    rows = re.findall(r"^\| (\w+) \| `(passes/\w+\.py)` \|", PAGES["architecture.md"], re.MULTILINE)
    assert [name for name, _ in rows] == [step.__name__ for step in (*pipeline.LOOK, pipeline.attach)]
    assert all(f"def {name}(" in (ROOT / file).read_text() for name, file in rows)


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


class TestSite:
    """What `make docs` builds; the build itself fails on a link that leads nowhere (mkdocs build --strict)."""

    SITE = (ROOT / "mkdocs.yml").read_text()

    def test_every_page_is_in_the_navigation(self) -> None:
        listed = re.findall(r"^ +- (?:\w+: )?([\w/-]+\.md)$", self.SITE, re.MULTILINE)
        pages = [page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")]
        assert sorted(listed) == sorted(pages)

    def test_the_reference_has_the_public_names(self) -> None:
        from importlib import import_module

        import llcompile
        from llcompile import ops

        entries = re.findall(r"^::: ([\w.]+)\n    options: \{heading: ([\w.]+),", PAGES["reference.md"], re.MULTILINE)
        assert len(entries) == PAGES["reference.md"].count(":::")
        headings = dict(entries).values()
        assert {f"llcompile.{name}" for name in llcompile.__all__ if name != "__version__"} <= set(headings)
        assert {f"llcompile.ops.{name}" for name in ops.__all__} <= set(headings)
        assert set(headings) <= set(re.findall(r"`(llcompile\.[\w.]+)`", PAGES["public-api.md"])) | {
            "llcompile.errors",
            "llcompile.patterns.known.KnownFunction",
            "llcompile.patterns.known.Tensor",
        }
        for defined, heading in entries:
            if defined == heading == "llcompile.errors":
                continue
            shown, name = (path.rpartition(".")[::2] for path in (defined, heading))
            assert getattr(import_module(shown[0]), shown[1]) is getattr(import_module(name[0]), name[1])

    def test_make_docs_installs_the_extra_and_fails_on_a_warning(self) -> None:
        make = (ROOT / "Makefile").read_text()
        (command,) = re.findall(r"mkdocs build .*", make.partition("docs: $(DOCS)")[2].partition("lint:")[0])[1:]
        assert "--strict" in command
        assert "--quiet" not in command  # it hides warnings from --strict
        (extra,) = re.findall(r"^docs = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
        assert "mkdocs-material" in extra
        assert "mkdocstrings[python]" in extra


# Kinds of sentences that do not read as plain English, in documents and in help texts.
ODD = re.compile(
    r"\b(hangs on|[Nn]obody|makes no sense|will do[,.]|what for\b|page tells|tells (?:the|how|what|whether)|"
    r"is no (?:mixer|file|folder|operand|config)|cut short|all the same|that there (?:is|are)\b)"
)


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_are_in_plain_english(page: Path) -> None:
    prose = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert not [" ".join(odd.group(0).split()) for odd in ODD.finditer(" ".join(prose.split()))]


def helps(parser: argparse.ArgumentParser) -> Iterator[str]:
    """The line of help of each command below a parser, and its description."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from (choice.help or "" for choice in action._choices_actions)
            for command in action.choices.values():
                yield command.description or ""
                yield from helps(command)


def test_help_is_in_the_imperative() -> None:
    """It starts with a verb without an ending: "report", and not "reports" or "the report"."""
    from llcompile.commands.cli import COMMANDS

    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers()
    for command in COMMANDS:
        importlib.import_module(command.module).add_parser(commands)
    found = [text for text in (*helps(parser), *(command.help for command in COMMANDS)) if text and text[0] != "`"]
    verbs = {
        "check",
        "compile",
        "convert",
        "count",
        "draw",
        "list",
        "measure",
        "print",
        "report",
        "run",
        "show",
        "time",
        "train",
        "write",
    }
    assert len(found) > 20
    assert {text.split()[0].lower() for text in found} <= verbs
