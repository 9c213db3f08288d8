"""Each file of llcompile/torch_internals has a test file here that names all that is public in it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
PACKAGE = FOLDER.parent.parent / "llcompile" / "torch_internals"
FILES = sorted(path for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def public(file: Path) -> set[str]:
    """The functions and classes that a file defines for others."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return {node.name for node in ast.parse(file.read_text()).body if isinstance(node, kinds) and node.name[0] != "_"}


def used(file: Path) -> set[str]:
    """The names that code of a file reads; imports alone, comments and text do not count."""
    nodes = list(ast.walk(ast.parse(file.read_text()))) if file.exists() else []
    return {n.id for n in nodes if isinstance(n, ast.Name)} | {n.attr for n in nodes if isinstance(n, ast.Attribute)}


@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_all_that_is_public_is_tested(file: Path) -> None:
    assert public(file) - used(FOLDER / f"test_{file.name}") == set()


def test_what_is_public_is_found() -> None:
    assert {"unwrapped", "tracing_backend"} <= public(PACKAGE / "backends.py")
    assert "_outermost" not in public(PACKAGE / "backends.py")
    assert len(FILES) > 15
