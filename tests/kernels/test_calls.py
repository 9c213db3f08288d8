"""What one eager call asks of the host: counts that fail when exceeded, and that they count."""

from __future__ import annotations

import dataclasses

import pytest

pytest.importorskip("triton")

from llcompile.commands import cli
from llcompile.commands.kernels_calls import CASES, asked, ceiling_of
from llcompile.kernels import operands
from llcompile.kernels.implementations import IMPLEMENTATIONS

QUICK = {"scalar/none", "scalar/delta"}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Generated files stay in the test's folder."""
    monkeypatch.setenv("LLCOMPILE_KERNEL_DIR", str(tmp_path / "kernels"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def name(case):
    return f"{case.family}-{case.operation}-{'linear' if case.levels is None else case.levels}"


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=name(c), marks=[] if c.family in QUICK and c.levels else [pytest.mark.slow]) for c in CASES],
)
def test_ceilings(case):
    """No call asks for more than it did."""
    before = dict(IMPLEMENTATIONS), set(operands.PLAIN)
    found, ceiling = asked(case), ceiling_of(case)
    assert 0 < found.operators.total() <= ceiling.operators
    assert 0 < found.launches.total() <= ceiling.launches
    assert (dict(IMPLEMENTATIONS), set(operands.PLAIN)) == before


def test_what_is_asked_for_is_counted():
    """The check of decays and the new state, among others; and one launch more for a tree of one level more."""
    case = next(c for c in CASES if (c.family, c.operation, c.levels) == ("scalar/delta", "step", 12))
    found = asked(case)
    assert found.operators["_assert_async.msg"] == 1  # a log decay above 0 is still an error
    assert found.operators["empty_like"] + found.operators["empty_like.default"] == 1
    whole = next(c for c in CASES if (c.family, c.operation, c.levels) == ("scalar/none", "forward", 12))
    longer = asked(dataclasses.replace(whole, length=2048))
    assert longer.launches["tree_up"] == asked(whole).launches["tree_up"] + 1


def test_command(capsys):
    """A table with the ceilings beside."""
    assert cli.main(["kernels", "cost", "--calls", "--family", "none/none", "--pass", "step"]) == 0
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert "operators of torch" in header
    assert [row.split(" | ")[2] for row in rows] == ["12", "none"]
