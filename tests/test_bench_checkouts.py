"""Two checkouts are compared by what they say, and by the smallest time of each step."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.checkouts import __main__ as checkouts
from tests.spellings import NEGATIVE, POSITIVE

ROOT = Path(__file__).parent.parent
SAID = [["mixer", "converted", "graph", "scalar decay"]]


def test_the_smallest_time_and_the_last_report_count() -> None:
    known: dict[str, object] = {}
    for seconds in (2.0, 1.0, 3.0):
        checkouts.add(known, {"inspect": seconds, "said": SAID})
    assert known == {"inspect": 1.0, "said": SAID}


def test_a_report_that_differs_is_named() -> None:
    same = {"before": {"said": SAID, "inspect": 2.0}, "after": {"said": SAID, "inspect": 3.0}}
    other = {"before": {"said": SAID, "inspect": 2.0}, "after": {"said": [], "inspect": 1.0}}
    failed = {"before": {"error": "it broke"}, "after": {"error": "it broke"}}
    lines = checkouts.summary({"a": same, "b": other, "c": failed})
    assert lines[:3] == ["1 of 3 reports are equal", "differs: b", "differs: c"]
    assert lines[3:] == ["inspect: 4.0 s before, 4.0 s after (1.00), CPU time of 2"]


@pytest.mark.slow
def test_a_checkout_equals_itself(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "benchmarks.checkouts",
        str(ROOT),
        str(ROOT),
        "--corpus",
        "--json",
        str(tmp_path / "r.json"),
    ]
    only = ["--only", next(iter(POSITIVE)), next(iter(NEGATIVE))]
    done = subprocess.run([*command, *only], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("2 of 2 reports are equal")
    found = json.loads((tmp_path / "r.json").read_text())["results"]
    assert all(side["said"] for result in found.values() for side in result.values())
