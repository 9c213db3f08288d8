"""What a run of tests has told before its time is up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.as_they_come import pytest_runtest_logreport


def report(outcome: Any, name: str) -> pytest.TestReport:
    sections = [("Captured stdout call", "said before")]
    return pytest.TestReport(f"test_one.py::{name}", ("test_one.py", 1, name), {}, outcome, "1 == 2", "call", sections)


@pytest.fixture
def failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FAILURES", str(tmp_path / "failures.txt"))
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    return tmp_path / "failures.txt"


def test_failures_alone_are_written(failures: Path) -> None:
    pytest_runtest_logreport(report("passed", "right"))
    assert not failures.exists()
    for name in ("wrong", "wrong_too"):
        pytest_runtest_logreport(report("failed", name))
    text = failures.read_text()
    assert [line for line in text.splitlines() if line.startswith("===== ")] == [
        "===== test_one.py::wrong (call)",
        "===== test_one.py::wrong_too (call)",
    ]
    assert text.count("1 == 2") == text.count("said before") == 2


def test_one_process_writes(failures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    pytest_runtest_logreport(report("failed", "wrong"))
    assert not failures.exists()
