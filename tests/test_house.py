"""The rules of the house that no linter checks: imports go one way, and in no circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("kernels", "passes", "patterns")
# Where the name of a folder's packages begins.
PREFIXES = {"llcompile": "", "benchmarks": "", "examples": None, **dict.fromkeys(FOLDERS, "llcompile.")}
# What the folders below the front door may import of it.
BELOW = ("llcompile.errors", "llcompile.torch_internals")


def modules() -> dict[str, Path]:
    """Every module by its name, files behind links once."""
    found: dict[str, Path] = {}
    for folder, prefix in PREFIXES.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            if folder == "llcompile" and parts[1] in FOLDERS:
                continue
            name = ".".join(parts[1:] if prefix is None else parts)
            found[(prefix or "") + name.removesuffix(".__init__")] = file
    return found


@cache
def graph() -> nx.DiGraph:
    """Who imports whom, wherever in a file the statement stands."""
    known = modules()
    arrows = nx.DiGraph()
    arrows.add_nodes_from(known)
    for name, file in known.items():
        package = name if file.name == "__init__.py" else name.rpartition(".")[0]
        for imported in imports(file, package):
            target = next((n for n in (imported, imported.rpartition(".")[0]) if n in known), None)
            if target is not None:
                arrows.add_edge(name, target)
    return arrows


def imports(file: Path, package: str = "") -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def is_in(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def breaches(inside: tuple[str, ...], forbidden: tuple[str, ...], allowed: tuple[str, ...] = ()) -> list[str]:
    return [
        f"{a} imports {b}"
        for a, b in graph().edges
        if is_in(a, *inside) and is_in(b, *forbidden) and not is_in(b, *inside, *allowed)
    ]


def test_every_arrow_is_seen() -> None:
    assert graph().has_edge("llcompile.backend", "llcompile.torch_internals.inner")
    assert graph().has_edge("llcompile.patterns.mixer", "llcompile.errors")
    assert graph().has_edge("benchmarks.cuda.command", "benchmarks.record")
    assert graph().has_edge("demo.acts", "llcompile.report")
    assert graph().number_of_edges() > 800


def test_no_circle() -> None:
    circles = [sorted(found) for found in nx.strongly_connected_components(graph()) if len(found) > 1]
    assert circles == []


@pytest.mark.parametrize(
    ("inside", "forbidden", "allowed"),
    [
        (("llcompile.torch_internals",), ("llcompile",), ("llcompile.errors",)),
        (("llcompile.kernels",), ("llcompile",), BELOW),
        (("llcompile.patterns",), ("llcompile",), (*BELOW, "llcompile.kernels")),
        (("llcompile.passes",), ("llcompile",), (*BELOW, "llcompile.kernels", "llcompile.patterns")),
        (("llcompile",), ("benchmarks", "demo"), ()),
    ],
    ids=[
        "torch_internals know nothing of ours",
        "kernels know nothing above",
        "patterns know no passes",
        "passes know no front door",
        "the package knows nothing beside it",
    ],
)
def test_arrows_go_one_way(inside: tuple[str, ...], forbidden: tuple[str, ...], allowed: tuple[str, ...]) -> None:
    assert breaches(inside, forbidden, allowed) == []


def test_only_the_command_line_knows_itself() -> None:
    commands = ("llcompile.commands", "llcompile.__main__")
    assert [a for a, b in graph().edges if is_in(b, "llcompile.commands") and not is_in(a, *commands)] == []


def test_no_bare_names() -> None:
    folders = ("llcompile", *FOLDERS, "tests", "examples", "benchmarks")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    bare = [f"{file.relative_to(ROOT)} imports {name}" for file in files for name in imports(file)]
    assert [line for line in bare if is_in(line.rpartition(" ")[2], *FOLDERS)] == []


def test_tests_import_helpers_and_not_one_another() -> None:
    files = (ROOT / "tests").rglob("*.py")
    found = [f"{file.relative_to(ROOT)} imports {name}" for file in files for name in imports(file)]
    assert [line for line in found if ".test_" in line.rpartition(" ")[2]] == []
