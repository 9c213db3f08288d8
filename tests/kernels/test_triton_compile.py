"""Kernels compiled for chips that are not there: registers, shared memory, spills, matrix instructions."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

pytest.importorskip("triton")

from llcompile.commands import cli
from llcompile.kernels.triton.check import HEADING, Report
from llcompile.kernels.triton.chips import CHIPS
from llcompile.kernels.triton.description import Description
from llcompile.kernels.triton.matrix import Results, read, representative, summary
from llcompile.kernels.triton.measured import fastest
from llcompile.kernels.triton.schedule import kernel_names
from llcompile.kernels.triton.source import kernel_text
from llcompile.kernels.triton.tuning import tuning

# What is compiled for sm_90 so that nothing may spill, but for launches that were measured to be faster, and these only
# so much. The other groups (fp32, odd sizes, K = 256) must fit.
SPILLED = 1024
UNSPILLED = ("large", "small", "states", "mixed", "float16", "rates")


@pytest.fixture(scope="module")
def results():
    """What was compiled in this module, each kernel once."""
    return Results(None)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Generated files stay in the test's folder."""
    monkeypatch.setenv("LLCOMPILE_KERNEL_DIR", str(tmp_path / "kernels"))


def holds(report: Report) -> None:
    """What every kernel must keep to on every chip."""
    print(report.row())
    assert report.fits(), report.row()
    if "dot(" in kernel_text(report.description, report.kernel):
        assert report.matrix, f"no matrix instruction: {report.row()}"
        assert report.products, report.row()
    # A default with several stages claims software pipelining, and has to show its copies.
    assert report.programs
    assert bool(report.copies) == (report.launch.stages > 1), report.row()


@pytest.mark.parametrize(
    ("chip", "kernel", "instruction"),
    [
        *(("sm_90", "output", "wgmma"), ("sm_90", "state_gradient", "wgmma")),
        *(("sm_80", "state_gradient", "mma.sync"), ("gfx942", "state_gradient", "mfma")),
    ],
)
def test_sample(results, chip, kernel, instruction):
    """One kernel of one family or two: it fits, uses matrix instructions, and does not spill."""
    report = results.report(Description("scalar", "none", 64, 64, levels=16), kernel, chip)
    holds(report)
    assert report.spilled == 0, report.row()
    assert instruction in report.matrix


@pytest.mark.parametrize("kernel", ["rate_scan", "rate_write_gradient"])
@pytest.mark.parametrize("chip", ["sm_90", pytest.param("sm_80", marks=pytest.mark.slow)])
def test_rates(results, chip, kernel):
    """The states of 16 levels of some heads stay in registers."""
    report = results.report(Description("rate", "none", 16, 1, repeat=64, levels=16), kernel, chip)
    holds(report)
    assert report.spilled == 0, report.row()


def test_erase_keys(results):
    """The kernel that makes effective queries, keys and transitions fits and uses matrix instructions."""
    holds(results.report(Description("channel", "erase", 16, 16, levels=16), "erase_chunk", "sm_80"))


def test_exact_products_on_amd(results):
    """fp32 operands: three tf32 products stand for one on NVIDIA's chips; AMD's take fp32 as it is."""
    d = Description("none", "none", 16, 16, levels=16, dtype=torch.float32)
    holds(results.report(d, "state_gradient", "gfx942"))
    assert '"ieee"' in kernel_text(dataclasses.replace(d, backend="hip"), "state_gradient")
    assert '"tf32x3"' in kernel_text(dataclasses.replace(d, backend="cuda"), "state_gradient")


def test_results_are_kept(tmp_path, capsys):
    """What was compiled is found again by what it is made of, under any description that shares it."""
    path = tmp_path / "compiled.json"
    d = Description("none", "none", 16, 16, levels=None)
    first = Results(path).report(d, "state_scan", "sm_90")
    kept = Results(path)
    assert list(kept.found.values()) == [first]
    other = dataclasses.replace(d, repeat=2)
    assert kept.report(other, "state_scan", "sm_90") == dataclasses.replace(first, description=other.on(CHIPS["sm_90"]))
    assert len(kept.found) == 1
    assert cli.main(["kernels", "matrix", "--summary", "--json", str(path)]) == 0
    assert capsys.readouterr().out.splitlines() == list(summary([first]))
    assert cli.main(["kernels", "matrix", "--rows", "--json", str(path)]) == 0
    assert capsys.readouterr().out.splitlines() == [HEADING, first.row()]
    assert cli.main(["kernels", "matrix", "--rows", "--json", str(tmp_path / "none.json")]) != 0
    assert "--rows needs --json with an existing file" in capsys.readouterr().err
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"versions": {"triton": "of another time"}}))
    assert not Results(path).found
    assert len(read(path)[1]) == 1


def test_measured_launches():
    """They serve the chip and the operands that were measured, and no tile is wider than the values."""
    d = Description("scalar", "none", 128, 64, levels=16)
    assert tuning("output", d, CHIPS["sm_90"]) == (64, 4, 1)
    assert tuning("state_gradient", d, CHIPS["sm_90"]) == (64, 4, 3)
    others = [
        (d, "sm_80"),
        (d, "sm_100"),
        (dataclasses.replace(d, dtype=torch.float32), "sm_90"),
        (dataclasses.replace(d, decay="channel"), "sm_90"),
        (dataclasses.replace(d, key_dim=256), "sm_90"),
        (dataclasses.replace(d, levels=None), "sm_90"),
    ]
    for description, chip in others:
        assert tuning("output", description, CHIPS[chip]) == (64, 8, 1)


def test_limits_leave_something():
    """On every chip, the limits leave some of the sets that are compiled for it."""
    for chip in CHIPS:
        assert list(representative("large", chip)), chip
        assert len(list(representative("small", chip))) == len(list(representative("small", "sm_90")))


def in_full(*sets: tuple[tuple[str, ...], tuple[str, ...]]) -> pytest.MarkDecorator:
    """A test for each description of some groups on each of some chips; a set is chips and groups."""
    rows = [
        (chip, d) for chips, groups in sets for chip in chips for group in groups for d in representative(group, chip)
    ]
    names = [f"{chip}-{d.decay}-{d.correction}-{d.key_dim}-{d.value_dim}" for chip, d in rows]
    return pytest.mark.parametrize(("chip", "d"), rows, ids=names)


@pytest.mark.slow
@in_full((("sm_90",), UNSPILLED))
def test_hopper_in_full(results, chip, d):
    """Every kernel of every family at K, V of 64 and 128: nothing spills unless it was measured to be faster."""
    print(HEADING)
    for kernel in kernel_names(d):
        report = results.report(d, kernel, chip)
        holds(report)
        assert report.spilled <= (SPILLED if fastest(kernel, d, CHIPS[chip]) else 0), report.row()


# What must compile, fit and use matrix instructions, spills or not: chips, and the groups that are theirs.
FITTING = (
    (("sm_90",), ("float32", "odd", "wide", "erase")),
    (("sm_80", "sm_100", "gfx942"), ("large",)),
    (("sm_80", "sm_100", "gfx942"), ("rates", "erase")),
    (("sm_86", "sm_89", "sm_120"), ("small",)),  # where a program may have 99 KB of shared memory
)


@pytest.mark.slow
@in_full(*FITTING)
def test_it_fits(results, chip, d):
    """Every kernel of every family."""
    print(HEADING)
    for kernel in kernel_names(d):
        holds(results.report(d, kernel, chip))
