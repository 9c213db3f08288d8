"""Kernels compiled for chips that are not there: registers, shared memory, spills, matrix instructions."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from llcompile.kernels.triton.check import CHIPS, HEADING, Report, reports, representative
from llcompile.kernels.triton.description import Description

# Kernels without products of tiles, some of them only where there is no delta rule.
ELEMENTWISE = {"tree_up", "tree_down", "state_scan", "scan_gradient", "chunk_gradient", "final_state_gradient"}
ELEMENTWISE |= {"decode"}

SMALL = [d for d in representative() if d.key_dim == 64]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Generated files and Triton's results stay in the test's folder."""
    monkeypatch.setenv("LLCOMPILE_KERNEL_DIR", str(tmp_path / "kernels"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))


def holds(report: Report) -> None:
    """What every kernel must keep to on every chip."""
    print(report.row())
    assert report.shared <= CHIPS[report.chip][3], report.row()
    if report.kernel not in ELEMENTWISE:
        assert report.matrix, f"no matrix instruction: {report.row()}"


def test_hopper():
    """Two kernels of one family, as a sample: forward and backward, tensor cores and no spills."""
    print(HEADING)
    d = Description("scalar", "none", 64, 64, levels=16)
    found = list(reports(d, "sm_90", ("output", "state_gradient")))
    assert len(found) == 2
    for report in found:
        holds(report)
        assert report.spilled == 0, report.row()
        assert "wgmma" in report.matrix


@pytest.mark.slow
@pytest.mark.parametrize("d", list(representative()), ids=lambda d: f"{d.decay}-{d.correction}-{d.levels}-{d.key_dim}")
def test_hopper_in_full(d):
    """Every kernel of every family at K, V of 64 and 128: nothing spills."""
    print(HEADING)
    for report in reports(d, "sm_90"):
        holds(report)
        assert report.spilled == 0, report.row()


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["sm_80", "sm_100", "gfx942"])
@pytest.mark.parametrize(
    "d", [d for d in representative() if d.key_dim == 64], ids=lambda d: f"{d.decay}-{d.correction}"
)
def test_other_chips(d, chip):
    """Every kernel of every family compiles, fits, and uses matrix instructions."""
    print(HEADING)
    for report in reports(d, chip):
        holds(report)
