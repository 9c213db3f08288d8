"""No wrong number of a miscompiled kernel: kernels are tested before their first use, here with stand-ins."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest
import torch

pytest.importorskip("triton")

from llcompile.errors import KernelTestError
from llcompile.kernels import choice
from llcompile.kernels.description import Description, ReadoutDescription, describe, describe_step
from llcompile.kernels.implementations import ATEN
from llcompile.kernels.triton import acceptance, acceptance_cases, autotune, blocks, records
from llcompile.kernels.triton.toolchain import toolchain_of
from tests.kernels.stand_in import StandIn, calls, one_number

pytestmark = pytest.mark.usefixtures("fresh_kernels")
CPU = torch.device("cpu")
SWEEPS = ("forward", "backward", "step", "step in place", "replay", "fold")
OF_READOUTS = SWEEPS[:3]


@pytest.mark.parametrize("sweep", SWEEPS)
def test_a_wrong_number_ends_in_refusal(install, caplog, sweep):
    """Under auto ATen runs with one warning, by name it is an error that says what failed; right passes go on."""
    with choice.use("aten"):
        want = calls()[sweep]()
    one = install(StandIn(sweep, one_number))
    for _ in range(3):
        assert torch.equal(calls()[sweep](), want)
    tested = one.calls
    assert caplog.text.count("the ATen lowering is used instead of Triton kernels") == 1
    assert "differs from the ATen form in float64 by" in caplog.text
    with (
        choice.use("triton"),
        pytest.raises(KernelTestError, match=r"=triton\), but their test .* failed: the .* differs"),
    ):
        calls()[sweep]()
    assert one.calls == tested  # the kernels never ran for the caller
    for other in set(SWEEPS) - {sweep}:
        before = one.calls
        calls()[other]()
        assert one.calls > before


@pytest.mark.parametrize("sweep", SWEEPS)
def test_right_kernels_are_tested_once(install, caplog, sweep):
    """Then they run; the next process finds the result on disk."""
    one = install(StandIn())
    calls()[sweep]()
    tested = one.calls
    calls()[sweep]()
    assert one.calls == tested + 1
    assert tested > 2
    acceptance._known.clear()
    calls()[sweep]()
    assert one.calls == tested + 2
    assert not caplog.records
    (path,) = records.folder().glob("*.json")
    found = json.loads(path.read_text())
    assert found["result"] == "passed"
    assert found["question"]["pass"] == sweep
    assert found["question"]["triton"] == ".".join(map(str, toolchain_of(CPU).triton))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda found: [found[0] * torch.nan, *found[1:]], "is not finite"),
        (lambda found: [found[0] + 1e-3 * torch.rand(()), *found[1:]], "differs from run to run"),
        (lambda found: [found[0][:, :-1], *found[1:]], "has shape"),
        (one_number, "is allowed"),
    ],
)
def test_what_is_wrong(change, words):
    """Everything that a wrong kernel may do."""
    d = Description("scalar", "delta", 8, 8, repeat=2, dtype=torch.float32, levels=6)
    assert acceptance.test(StandIn(), ATEN, d, CPU, "forward") is None
    found = acceptance.test(StandIn("forward", change), ATEN, d, CPU, "forward")
    assert found is not None
    assert words in found


@pytest.mark.parametrize(("correction", "dtype"), [("none", torch.float32), ("delta", torch.bfloat16)])
def test_a_long_call_is_tested_in_blocks(correction, dtype):
    """Its kernels are others (`blocks`): one number that only they get wrong is found."""
    d = Description("scalar", correction, 8, 8, dtype=dtype, levels=6)

    def wrong_when_long(found):
        return one_number(found) if found[0].shape[1] > blocks.WALK * d.chunk else found

    assert acceptance.test(StandIn(), ATEN, d, CPU, "forward") is None
    assert "is allowed" in acceptance.test(StandIn("forward", wrong_when_long), ATEN, d, CPU, "forward")


def test_a_wrong_position():
    """A level state whose header counts wrongly; and one gradient of many."""
    d = Description("none", "none", 8, 8, dtype=torch.float32, levels=6)

    def counts_on(found):
        found[1][:, :, 0, 0, 0] += 1
        return found

    assert "the position in the header" in acceptance.test(StandIn("step", counts_on), ATEN, d, CPU, "step")
    in_place = acceptance.test(StandIn("step in place", counts_on), ATEN, d, CPU, "step in place")
    assert "the position in the header" in in_place
    decayed = dataclasses.replace(d, decay="scalar")

    def loses(found):
        found[4] = None
        return found

    assert acceptance.test(StandIn("backward", loses), ATEN, decayed, CPU, "backward") == (
        "the gradient of log_decay is missing"
    )


FAMILIES = [
    *itertools.product(("none", "scalar", "channel"), ("none", "delta", "erase")),
    ("rate", "none"),
]


@pytest.mark.parametrize(("decay", "correction"), FAMILIES)
def test_operands_are_of_the_description(decay, correction):
    """What a test runs is described by what it is to test, in every detail, with each kind of rows and states."""
    for (levels, old), final, rows, dtype, repeat in zip(
        [(None, "none"), (9, "none"), (9, "linear"), (9, "level"), (None, "linear"), (3, "level")],
        (False, True, False, True, True, False),
        ("", "padded", "packed", "padded", "", "packed"),
        (torch.bfloat16, torch.float16, torch.float32) * 2,
        (1, 3, 2, 1, 9, 2),
        strict=True,
    ):
        d = Description(decay, correction, 16, 8, repeat, dtype, levels=levels, initial_state=old, final_state=final)
        d = dataclasses.replace(d, padded=rows == "padded", packed=rows == "packed")
        x = acceptance_cases.sequence(d, ATEN.forward)
        assert describe(x, final) == d
        assert x.v.shape[1] == acceptance_cases.TOKENS
    d = Description(decay, correction, 16, 8, 2, torch.bfloat16, levels=9)
    assert {describe_step(token) for token in acceptance_cases.tokens(d, ATEN.forward)} == {d}


@pytest.mark.parametrize(("decay", "correction"), FAMILIES)
def test_what_is_right_is_accepted(decay, correction):
    """ATen in half precision keeps to the budget of its dtype, in all passes."""
    for levels, dtype in ((9, torch.bfloat16), (None, torch.float16)):
        d = Description(decay, correction, 16, 8, 2, dtype, levels=levels, final_state=True)
        for sweep in SWEEPS[:4]:
            assert acceptance.test(StandIn(), ATEN, d, CPU, sweep) is None, (d, sweep)
        if decay != "rate":  # which has no kernel for it
            replayed = dataclasses.replace(d, initial_state="linear" if levels is None else "level", final_state=False)
            assert acceptance.test(StandIn(), ATEN, replayed, CPU, "replay") is None, d
            assert acceptance.test(StandIn(), ATEN, replayed, CPU, "fold") is None, d


@pytest.mark.parametrize("sweep", OF_READOUTS)
def test_readouts(sweep):
    """The kernels of per-level readouts likewise."""
    d = ReadoutDescription(5, 8, torch.float32)
    assert acceptance.rejection(StandIn(), ATEN, d, CPU, sweep) is None
    acceptance._known.clear()
    for path in records.folder().glob("*.json"):
        path.unlink()
    assert "differs from the ATen form" in acceptance.rejection(StandIn(sweep, one_number), ATEN, d, CPU, sweep)


def test_the_callers_random_numbers_stay(install):
    """A test in the middle of a program changes none of them."""
    install(StandIn())
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    calls()["forward"]()
    assert torch.equal(torch.rand(3), want)


def test_nothing_is_tested_in_the_interpreter(monkeypatch):
    """There is no compiler to mistrust."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    one = StandIn("forward", one_number)
    assert acceptance.rejection(one, ATEN, Description("none", "none", 8, 8), CPU, "forward") is None
    assert one.calls == 0


def test_nothing_is_tuned_for_a_test(monkeypatch):
    """With autotuning on, a test runs the defaults; what comes after it is tuned."""
    seen = []

    class Asks(StandIn):
        def forward(self, x, scale, final):
            seen.append(autotune._fixed.get())
            return super().forward(x, scale, final)

    monkeypatch.setenv(autotune.VARIABLE, "1")
    d = Description("none", "none", 8, 8, dtype=torch.float32)
    assert acceptance.rejection(Asks(), ATEN, d, CPU, "forward") is None
    assert seen
    assert all(launches == {} for launches, _ in seen)
    assert autotune._fixed.get() is None
