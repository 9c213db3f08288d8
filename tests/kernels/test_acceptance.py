"""No wrong number of a miscompiled kernel: known faults are refused, and kernels are tested before their first use.

Stand-ins for the Triton kernels compute what ATen does, or what a wrong kernel would; no GPU is needed.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("triton")

from llcompile.errors import KernelCacheError, KernelError, KernelTestError
from llcompile.kernels import cache, choice
from llcompile.kernels.description import Description, ReadoutDescription, describe, describe_step
from llcompile.kernels.implementations import ATEN, IMPLEMENTATIONS, Triton
from llcompile.kernels.operands import Operands, Token
from llcompile.kernels.state import empty_state
from llcompile.kernels.triton import acceptance, acceptance_cases, faults, limits, records
from llcompile.kernels.triton.chips import CHIPS
from llcompile.kernels.triton.toolchain import Toolchain, toolchain_of, version
from tests.kernels.kernel_cases import operands

CPU = torch.device("cpu")
SWEEPS = ("forward", "backward", "step")


class StandIn(Triton):
    """In place of the kernels: ATen's results with `change` applied to the ones of one pass; counts its calls."""

    def __init__(self, sweep: str = "", change=None) -> None:
        self.sweep, self.change, self.calls = sweep, change, 0

    def reason(self, d, device):
        return None

    def refusal(self, error, d, device):
        return None

    def _changed(self, sweep, found):
        self.calls += 1
        return found if sweep != self.sweep else self.change([t if t is None else t.clone() for t in found])

    def forward(self, x, scale, return_final_state):
        return tuple(self._changed("forward", ATEN.forward(x, scale, return_final_state)))

    def backward(self, x, scale, grad_o, grad_state):
        return self._changed("backward", ATEN.backward(x, scale, grad_o, grad_state))

    def step(self, token):
        return tuple(self._changed("step", ATEN.step(token)))

    def readouts(self):
        plain, changed = ATEN.readouts(), self._changed

        class Form:
            forward = staticmethod(lambda *x: changed("forward", plain.forward(*x)))
            backward = staticmethod(lambda *x: changed("backward", plain.backward(*x)))
            step = staticmethod(lambda *x: changed("step", plain.step(*x)))

        return Form


def one_number(found):
    """One number of the first result is wrong by half of the largest."""
    found[0].view(-1)[3] += 0.5 * found[0].abs().max()
    return found


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """A process that has tested, refused and told nothing, with an empty folder; the seed is not touched."""
    monkeypatch.setenv(cache.FOLDER_VARIABLE, str(tmp_path / "kernels"))
    monkeypatch.delenv(choice.VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(acceptance, "_known", {})
    monkeypatch.setattr(choice, "_refused", {})
    choice._tell.cache_clear()


@pytest.fixture
def install(monkeypatch):
    """A function that puts a stand-in where `auto` and `triton` find it, on a CPU."""

    def put(one: StandIn) -> StandIn:
        monkeypatch.setitem(IMPLEMENTATIONS, "triton", one)
        monkeypatch.setattr(choice, "preferred", lambda device: one)
        return one

    return put


def calls():
    """A pass of each kind."""
    x = Operands(*operands(20, dtype=torch.float32, delta=True, levels=6, key_dim=8, value_dim=8).values(), None)
    token = (*(t[:, 0] for t in x[:4]), empty_state(2, 4, 8, 8, 6), x.log_decay[:, 0], None, x.beta[:, 0])
    return {
        "forward": lambda: choice.forward(x, 1.0, False)[0],
        "backward": lambda: choice.backward(x, 1.0, x.v, None)[2],
        "step": lambda: choice.step(Token(*token))[0],
    }


# -- wrong kernels -----------------------------------------------------------------------------------------------------


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
    with choice.use("triton"), pytest.raises(KernelTestError, match=r"=triton\), but their test .* failed: the .* differs"):
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


def test_a_wrong_position():
    """A level state whose header counts wrongly; and one gradient of many."""
    d = Description("none", "none", 8, 8, dtype=torch.float32, levels=6)

    def counts_on(found):
        found[1][:, :, 0, 0, 0] += 1
        return found

    assert "the position in the header" in acceptance.test(StandIn("step", counts_on), ATEN, d, CPU, "step")
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
        for sweep in SWEEPS:
            assert acceptance.test(StandIn(), ATEN, d, CPU, sweep) is None, (d, sweep)


@pytest.mark.parametrize("sweep", SWEEPS)
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


# -- results on disk ---------------------------------------------------------------------------------------------------


def ask(one, sweep="forward", **changes):
    d = dataclasses.replace(Description("none", "none", 8, 8, dtype=torch.float32), **changes)
    acceptance._known.clear()
    return acceptance.rejection(one, ATEN, d, CPU, sweep)


def test_a_failure_is_kept_for_what_it_was_found_with(monkeypatch):
    """Not for another pass or description, nor for another Triton; a removed file is tested again."""
    wrong, right = StandIn("forward", one_number), StandIn()
    assert "remove it to test them again" in ask(wrong)
    assert ask(right) is not None
    assert right.calls == 0
    assert ask(right, "backward") is None
    assert ask(right, key_dim=16) is None
    with monkeypatch.context() as patch:
        other = toolchain_of(CPU)._replace(triton=(99, 0))
        patch.setattr(records, "toolchain_of", lambda device: other)
        assert ask(right) is None
    assert ask(right) is not None
    for path in records.folder().glob("*.json"):
        path.unlink()
    assert ask(right) is None


def test_damaged_records_are_tested_again():
    """A file that is no JSON, or that answers another question."""
    right = StandIn()
    assert ask(right) is None
    (path,) = records.folder().glob("*.json")
    for text in ("{", "[]", json.dumps({"question": {}, "result": "failed", "found": "x"})):
        path.write_text(text)
        before = right.calls
        assert ask(right) is None
        assert right.calls > before


def die(one):
    """Run in a process of its own, which the kernel takes down."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    ask(one)


def _exit(found):
    os._exit(1)


def test_a_kernel_that_takes_its_process_down():
    """Tried once more, then refused."""
    context = multiprocessing.get_context("fork")
    for _ in range(records.ATTEMPTS):
        process = context.Process(target=die, args=(StandIn("forward", _exit),))
        process.start()
        process.join(60)
        assert process.exitcode == 1
    right = StandIn()
    assert "2 processes ended while they ran it" in ask(right)
    assert right.calls == 0


def test_an_interrupt_is_no_failure():
    """And neither is a lack of memory, which is said."""

    def interrupt(found):
        raise KeyboardInterrupt

    def no_memory(found):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with pytest.raises(KeyboardInterrupt):
        ask(StandIn("forward", interrupt))
    assert "no memory to test them (CUDA out of memory" in ask(StandIn("forward", no_memory))
    assert not list(records.folder().glob("*.json"))
    assert ask(StandIn()) is None


def test_an_error_is_a_failure():
    """Whatever a kernel raises that is not Triton's word that it cannot be made."""

    def fault(found):
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    assert "RuntimeError: Triton Error [CUDA]: an illegal memory access" in ask(StandIn("forward", fault))


def test_a_lost_device_is_said(monkeypatch):
    """After an illegal access ATen does not run either; the next process knows."""
    record = records.Record(records.question(Description("none", "none", 8, 8), CPU, "forward"))

    def synchronize(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with pytest.raises(KernelTestError, match="left the device unusable for this process.*start the program again"):
        acceptance._check_device(torch.device("cuda:0"), record, RuntimeError("illegal"))
    acceptance._check_device(CPU, record, RuntimeError("wrong"))


def test_a_folder_that_cannot_be_written(install, monkeypatch, tmp_path, caplog):
    """As with the kernels themselves: ATen, or an error by name."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(cache.FOLDER_VARIABLE, str(tmp_path / "file" / "kernels"))
    one = install(StandIn())
    calls()["forward"]()
    assert one.calls == 0
    assert cache.FOLDER_VARIABLE in caplog.text
    with choice.use("triton"), pytest.raises(KernelCacheError, match=cache.FOLDER_VARIABLE):
        calls()["forward"]()


def test_threads_wait_for_one_test():
    """Eight at once: one of them tests, all go by what it finds."""
    one = StandIn()
    d = Description("none", "none", 8, 8, dtype=torch.float32)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: acceptance.rejection(one, ATEN, d, CPU, "forward"), range(16)))
    assert found == [None] * 16
    assert one.calls == faults.repeats(toolchain_of(CPU))


def _in_turn(number, results):
    one = StandIn()
    results.put((ask(one), one.calls))


def test_processes_wait_for_one_test():
    """Those that start together: one tests, the others read its result."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_in_turn, args=(n, results)) for n in range(3)]
    for process in processes:
        process.start()
    found = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(count for _, count in found) == [0, 0, faults.repeats(toolchain_of(CPU))]
    assert all(reason is None for reason, _ in found)


# -- known faults ------------------------------------------------------------------------------------------------------


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


def test_nothing_is_tested_in_the_interpreter(monkeypatch):
    """There is no compiler to mistrust."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    one = StandIn("forward", one_number)
    assert ask(one) is None
    assert one.calls == 0

