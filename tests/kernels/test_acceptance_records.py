"""What tests of kernels found, on disk: other processes and threads, crashes, interrupts, damaged files."""

from __future__ import annotations

import dataclasses
import errno
import json
import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime import build

from llcompile.commands import doctor
from llcompile.errors import KernelCacheError, KernelTestError
from llcompile.kernels import cache, choice
from llcompile.kernels.description import Description
from llcompile.kernels.implementations import ATEN
from llcompile.kernels.triton import acceptance, faults, records, toolchain
from llcompile.kernels.triton.chips import CHIPS
from llcompile.kernels.triton.toolchain import Toolchain, toolchain_of
from tests.kernels.stand_in import StandIn, calls, one_number

pytestmark = pytest.mark.usefixtures("fresh_kernels")
CPU = torch.device("cpu")


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
    """A file that is no JSON, that answers another question, or that has no answer."""
    right = StandIn()
    assert ask(right) is None
    (path,) = records.folder().glob("*.json")
    kept = json.loads(path.read_text())
    other, unanswered = (
        kept | {"question": {}, "result": "failed", "found": "x"},
        kept | {"attempts": None, "result": 1},
    )
    for text in ("{", "[]", json.dumps(other), json.dumps(unanswered)):
        path.write_text(text)
        before = right.calls
        assert ask(right) is None
        assert right.calls > before


def without_a_compiler(found):
    """What Triton says where it cannot build its launchers."""
    build._build("launcher", "launcher.c", ".", [], [], [], [])


def without_room(found):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("missing", [without_a_compiler, without_room])
def test_what_the_machine_lacks_is_not_kept(monkeypatch, missing):
    """It says nothing of the kernels: this process remembers it, and the next one tests them."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    if hasattr(build, "_find_compiler"):  # Triton 3.9 remembers what it found
        build._find_compiler.cache_clear()
    found = ask(StandIn("forward", missing))
    assert "they could not be tested here: " in found
    right = StandIn()
    d = dataclasses.replace(Description("none", "none", 8, 8, dtype=torch.float32))
    assert acceptance.rejection(right, ATEN, d, CPU, "forward") == found
    assert not list(records.folder().glob("*.json"))
    assert ask(right) is None


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
    _, failed, tests = doctor.tests_of(CPU)
    assert "2 processes ended while they ran it" in failed.found
    assert "1 failed" in tests.found


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
    with pytest.raises(KernelTestError, match=r"left the device unusable for this process.*start the program again"):
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


def test_doctor_shows_what_was_found():
    """How many passed, and each failure with its description, its file and what to do; of this Triton alone."""
    assert ask(StandIn()) is None
    assert ask(StandIn("backward", one_number), "backward", key_dim=16) is not None
    first, failed, tests = doctor.tests_of(CPU)
    assert first.found.startswith("sm_90, Triton 3.")
    assert "backward of Description(decay='none'" in failed.found
    assert "key_dim=16" in failed.found
    assert "differs from the ATen form" in failed.found
    (path,) = records.folder().glob("backward_*.json")
    assert str(path) in failed.advice
    assert tests.found.startswith("1 passed, 1 failed")
    assert {finding.topic for finding in (first, failed)} == {"kernels on cpu"}


def test_doctor_shows_known_faults(monkeypatch):
    """A Triton that is refused, and one whose faults the tests look for."""
    for chip, words in (("sm_100", "not used: with Triton 3.6.0"), ("sm_90", "known faults, looked for in each test")):
        other = Toolchain(CHIPS[chip], (3, 6, 0), (12, 8))
        monkeypatch.setattr(toolchain, "toolchain_of", lambda device, other=other: other)
        found = next(doctor.tests_of(CPU))
        assert words in found.found
        assert "https://github.com/triton-lang/triton/issues/" in found.found
        assert found.ok is (None if chip == "sm_100" else True)
