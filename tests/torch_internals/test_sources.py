"""Digests of sources, for compile caches."""

from __future__ import annotations

from pathlib import Path

import llcompile
from llcompile.torch_internals.sources import digest, source_tag


def test_source_tag() -> None:
    assert source_tag() == digest(Path(llcompile.__file__).parent)
    assert len(source_tag()) == 16
    assert int(source_tag(), 16) >= 0


def test_what_changes_a_digest(tmp_path: Path) -> None:
    """Text and names of Python files and templates, also of those in folders and behind links; nothing else."""
    package, linked = tmp_path / "package", tmp_path / "linked"
    (package / "inner").mkdir(parents=True)
    (linked / "deep").mkdir(parents=True)
    (package / "kernels").symlink_to(linked)
    seen = [digest(package)]
    assert digest(package) == seen[0]
    for file in (package / "a.py", package / "inner" / "a.py", linked / "a.py", linked / "deep" / "a.jinja"):
        file.write_text("a = 1")
        seen.append(digest(package))
        file.write_text("a = 2")
        seen.append(digest(package))
    (linked / "a.py").rename(linked / "b.py")
    seen.append(digest(package))
    assert len(set(seen)) == len(seen)
    (package / "a.txt").write_text("a")
    assert digest(package) == seen[-1]
