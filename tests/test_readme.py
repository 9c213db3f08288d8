"""The README does not lie: its code runs as written, and what it names exists."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.rewrite import FORMS
from llcompile.commands.cli import COMMANDS

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


def test_the_example_shows_that_the_weights_act() -> None:
    assert BLOCKS
    for code in BLOCKS:
        assert "assert_close(after, before" in code
        moved = code[code.index("normal_(p)") :]
        assert re.search(r"^assert \(model\(\w+\)\.logits - \w+\)\.abs\(\)\.max\(\) > ", moved, re.MULTILINE)


def test_it_is_short() -> None:
    assert len(README.splitlines()) < 150


def test_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z]+)\b", " ".join(re.findall(r"^    .*|`[^`]*`", README, re.MULTILINE))))
    assert {"demo", "test"} <= named <= targets


def test_commands_exist() -> None:
    named = set(re.findall(r"`llcompile ([a-z]+)", README))
    assert {"doctor", "bench"} <= named <= {command.name for command in COMMANDS}


def test_the_speed_table_has_the_measured_numbers() -> None:
    (file,) = set(re.findall(r"`(benchmarks/results/rewrite-[\w.-]+\.json)`", README))
    record = json.loads((ROOT / file).read_text())
    assert record["threads"] == 1
    found = {
        (r["job"]["length"], r["job"]["form"]): r
        for r in record["results"]
        if r["job"]["backward"] and r["job"]["decay"] == "none"
    }
    rows = re.findall(r"^\| ([\d,]+) \| (.*) \|$", README, re.MULTILINE)
    assert len(rows) >= 3
    for length, cells in rows:
        times = [found[int(length.replace(",", "")), form] for form in FORMS if form != "inductor"]
        memory = f"{times[0]['peak_mib']:,.0f} / {times[-1]['peak_mib']:,.0f} MiB"
        told = cells.split(" | ")
        assert told[3] == memory
        for shown, r in zip(told, times, strict=False):
            digits = shown.removesuffix(" s")
            assert float(digits) == round(r["seconds"], len(digits.partition(".")[2]))


def test_the_operator_is_as_much_faster_as_measured() -> None:
    """The sentence on Mamba-2 and the ratios of log-linear to linear are those of the committed file."""
    (file,) = set(re.findall(r"`(benchmarks/results/operator-cpu-[\w.-]+\.json)`", README))
    times = {}
    for result in json.loads((ROOT / file).read_text())["results"]:
        job = result["job"]
        ours = job["runs"] == "llcompile" and job["kernels"] == "cpp"
        if (
            "seconds" in result
            and job["length"] == 16384
            and not job["compiled"]
            and (ours or job["runs"] != "llcompile")
        ):
            times[job["decay"], job["correction"], job["weights"] if ours else "peer", job["backward"]] = result[
                "seconds"
            ]
    text = " ".join(README.split())
    for backward, words in ((False, r"linear operator is ([\d.]+) times"), (True, r"forward and ([\d.]+) times with")):
        found = re.search(words, text)
        assert found
        faster = times["scalar", "none", "peer", backward] / times["scalar", "none", False, backward]
        assert round(faster, 1) == float(found[1])
    found = re.search(r"log-linear operator takes ([\d.]+) to ([\d.]+) times", text)
    assert found
    ratios = [t / times[d, c, False, b] for (d, c, kind, b), t in times.items() if kind is True]
    assert [round(min(ratios), 1), round(max(ratios), 1)] == [float(found[1]), float(found[2])]
