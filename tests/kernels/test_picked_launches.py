"""Launch parameters that tuning picks are tested before their first use, as the defaults are. No GPU is needed."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from llcompile.commands import doctor
from llcompile.kernels import choice
from llcompile.kernels.description import Description
from llcompile.kernels.implementations import ATEN, Triton
from llcompile.kernels.triton import acceptance, autotune, meter, records, toolchain
from llcompile.kernels.triton import description as triton
from llcompile.kernels.triton.acceptance_passes import cases
from llcompile.kernels.triton.chips import DEFAULT
from llcompile.kernels.triton.launch import Kernel, Launch
from llcompile.kernels.triton.schedule import BLOCKS, DECODE, GRADIENTS, kernel_names
from llcompile.kernels.triton.tuning import Tuning
from tests.kernels.stand_in import StandIn, calls, one_number

pytestmark = pytest.mark.usefixtures("fresh_kernels")
CPU = torch.device("cpu")
D = Description("scalar", "delta", 8, 8, dtype=torch.float32, levels=6)


class Launches(StandIn):
    """A stand-in that runs every kernel that a test sets the launch parameters of."""

    given: tuple[Tuning, ...] = ()

    def forward(self, x, scale, return_final_state):
        launches, ran = autotune._fixed.get() or ({}, set())
        ran.update(launches)
        self.given = tuple(launches.values())
        return super().forward(x, scale, return_final_state)


def picked() -> tuple[Kernel, Tuning]:
    kernel = Kernel(triton.Description.of(D), "output", DEFAULT)
    return kernel, autotune.candidates(kernel)[1]


def judge(one: Triton) -> str | None:
    with acceptance.picks_tested(one, ATEN, D, CPU, "forward"):
        return autotune._wrong(*picked())


def test_right_ones_are_tested_once():
    """With the parameters that were picked, and the result stays on disk."""
    one = Launches()
    assert judge(one) is None
    assert one.given == (picked()[1],)
    tested = one.calls
    assert judge(one) is None
    assert one.calls == tested
    (path,) = records.folder().glob("*.json")
    found = json.loads(path.read_text())
    assert found["result"] == "passed"
    assert found["question"]["kernel"] == "output"
    assert found["question"]["launch"] == list(picked()[1])


def test_wrong_ones_are_refused():
    """What the test finds is the reason, now and from disk, and `doctor` says it."""
    for one in (Launches("forward", one_number), Launches()):
        assert "differs from the ATen form in float64 by" in (judge(one) or "")
    said = [str(finding) for finding in doctor.tests_of(CPU)]
    assert any("output launched as" in line for line in said), said


def test_a_test_must_run_the_kernel():
    """A test in which the kernel does not run has not tested it."""
    assert "it does not run output" in (judge(StandIn()) or "")


def test_no_memory_is_of_this_moment():
    """Nothing is kept, and the defaults run."""

    class Full(StandIn):
        def forward(self, x, scale, return_final_state):
            raise torch.OutOfMemoryError("no room")

    assert "there is no memory to test them" in (judge(Full()) or "")
    assert not list(records.folder().glob("*.json"))
    assert judge(Launches()) is None


def test_the_defaults_are_not_tested_again():
    """They were, before the call."""
    one = Launches("forward", one_number)
    with acceptance.picks_tested(one, ATEN, D, CPU, "forward"):
        assert autotune._wrong(picked()[0], picked()[0].default) is None
    assert one.calls == 0


@pytest.mark.parametrize("sweep", ["forward", "backward", "step", "replay"])
def test_each_pass_has_a_test(install, sweep):
    """Whatever the operator runs, what is picked meanwhile is tested; afterwards there is no test."""
    seen = []

    class Asks(StandIn):
        def _changed(self, sweep: str, found: Any) -> Any:
            seen.append((autotune._fixed.get() is None, autotune._judge.get() is not None))
            return super()._changed(sweep, found)

    install(Asks())
    with choice.use("triton"):
        calls()[sweep]()
    assert seen[-1] == (True, True)
    assert autotune._judge.get() is None


OTHERS = [("none", "none"), ("scalar", "none"), ("channel", "none"), ("channel", "delta"), ("channel", "erase")]
FAMILIES = [("scalar", "delta"), *(pytest.param(*row, marks=pytest.mark.slow) for row in (*OTHERS, ("rate", "none")))]


@pytest.mark.parametrize(("decay", "correction"), FAMILIES)
def test_the_test_of_a_pass_runs_all_its_kernels(decay, correction):
    """No kernel of a description is left out of the tests of its passes, so that each pick of each can be tested."""
    for levels, old, final in ((6, "level", True), (6, "none", False), (None, "linear", True)):
        d = Description(decay, correction, 8, 8, dtype=torch.float32, levels=levels, initial_state=old)
        d = dataclasses.replace(d, final_state=final)
        ran = {sweep: launched(d, sweep) for sweep in ("forward", "backward")}
        all_names = set(kernel_names(triton.Description.of(d))) - {*DECODE}
        assert ran["forward"] | ran["backward"] >= all_names
        assert ran["forward"] >= all_names - {*GRADIENTS} - {"rate_read_gradient", "rate_write_gradient"}
        if (correction, levels, old, final) == ("none", 6, "none", False) and decay in ("none", "scalar"):
            assert ran["forward"] >= {*BLOCKS}


def launched(d: Description, sweep: Any) -> set[str]:
    """The kernels that are launched for the test of a pass; none is run."""
    names: set[str] = set()

    def note(launch: Launch) -> None:
        names.add(launch.kernel.name)

    with autotune.handed_to(note), torch.no_grad():
        for case in cases(ATEN, d, CPU, sweep):
            case(Triton(), case.given)
    return names


def test_picks_hold_for_the_ptxas_that_they_were_tested_with(monkeypatch):
    """What lies on disk is not tested again, so another assembler asks another question."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    found = toolchain.Toolchain(DEFAULT, (3, 6, 0), (12, 8))
    names = set()
    for here in (found, found._replace(ptxas=(13, 3)), found._replace(triton=(3, 7, 1))):
        monkeypatch.setattr(meter, "toolchain_of", lambda device, here=here: here)
        names.add(meter.Meter(0).name)
    assert len(names) == 3
