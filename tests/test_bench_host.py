"""`python -m benchmarks.host`: calls take the Triton kernels' way to the launcher, and the file says how long."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parent.parent
LAUNCHES = """
import sys
from benchmarks import host
launched = []
host._Launcher.__call__ = lambda self, *arguments: launched.append(arguments)
host.REPEATS = 3
code = host.main(sys.argv[1:])
print("launches", len(launched))
sys.exit(code)
"""


def test_a_step(tmp_path: Path) -> None:
    """In a process of its own, where Triton has another driver."""
    given = ["--families", "scalar/none", "--calls", "step", "--turns", "2", "--json", str(tmp_path / "found.json")]
    environment = {**os.environ, "LLCOMPILE_KERNEL_DIR": str(tmp_path / "kernels")}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHES, *given], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "found.json").read_text())["results"]
    assert (row["family"], row["call"]) == ("scalar/none", "step")
    assert 1 < row["microseconds"] < 1e6
    assert "launches 16" in done.stdout  # ten to warm up, and twice three
