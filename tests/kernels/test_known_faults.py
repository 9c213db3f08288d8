"""Faults of Triton and ptxas that are known: by chip and version, with a source and a cure."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from llcompile.errors import KernelError
from llcompile.kernels import choice
from llcompile.kernels.description import Description
from llcompile.kernels.implementations import IMPLEMENTATIONS
from llcompile.kernels.triton import faults, limits
from llcompile.kernels.triton.chips import CHIPS
from llcompile.kernels.triton.toolchain import Toolchain, toolchain_of, version
from tests.kernels.stand_in import StandIn, calls

pytestmark = pytest.mark.usefixtures("fresh_kernels")
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("chip", "triton", "ptxas", "refused", "repeats"),
    [
        ("sm_90", "3.6.0", "12.8", False, 8),
        ("sm_90", "3.7.1", "12.8", False, 8),
        ("sm_90", "3.9.0", "13.4", False, 2),
        ("sm_100", "3.6.0", "12.9", True, 2),
        ("sm_100", "3.7.1+git12", "13.1", True, 2),
        ("sm_100", "3.8.0", "13.3", False, 2),
        ("sm_120", "3.7.1", "13.1", False, 2),
        ("sm_80", "3.6.0", "12.8", False, 2),
        ("gfx942", "3.6.0", None, False, 2),
    ],
)
def test_table(chip, triton, ptxas, refused, repeats):
    """Chip, Triton and assembler."""
    found = Toolchain(CHIPS[chip], version(triton), None if ptxas is None else version(ptxas))
    assert (faults.refusal(found) is not None) == refused
    assert faults.repeats(found) == repeats


def test_every_fault_has_a_source_and_a_cure():
    """Who found it, as an address, and from which version on it is gone."""
    for fault in faults.FAULTS:
        assert fault.sources
        assert all(source.startswith("https://github.com/") for source in fault.sources)
        assert fault.since < fault.before
        assert ".".join(map(str, fault.before)) in fault.cure
        assert all(source in str(fault) for source in fault.sources)


def test_a_refused_triton(install, monkeypatch, caplog):
    """The message names both versions, the fault, its source and the cure; ATen runs under auto."""
    blackwell = Toolchain(CHIPS["sm_100"], (3, 7, 1), (13, 1))
    monkeypatch.setattr(limits, "toolchain_of", lambda device: blackwell)
    cuda = torch.device("cuda:0")
    d = Description("none", "none", 8, 8, dtype=torch.float32)
    found = IMPLEMENTATIONS["triton"].reason(d, cuda)
    assert found is not None
    for words in ("Triton 3.7.1", "sm_100", "triton/issues/10590", "install Triton 3.8 or later"):
        assert words in found
    monkeypatch.setattr(limits, "toolchain_of", lambda device: blackwell._replace(triton=(3, 8)))
    assert IMPLEMENTATIONS["triton"].reason(d, cuda) is None
    one = install(StandIn())
    monkeypatch.setattr(one, "reason", lambda d, device: found, raising=False)
    calls()["forward"]()
    assert one.calls == 0
    assert "install Triton 3.8 or later" in caplog.text
    with choice.use("triton"), pytest.raises(KernelError, match=r"install Triton 3.8 or later"):
        calls()["forward"]()


def test_this_toolchain():
    """What is read from the Triton that is installed."""
    found = toolchain_of(CPU)
    assert found.triton >= (3, 4)
    assert found.ptxas is not None
    assert found.ptxas >= (12,)
    assert str(found).startswith("sm_90, Triton 3.")
