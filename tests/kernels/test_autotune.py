"""Tuning of launches without a GPU: what is tried, what is chosen, what stays on disk. The clock is the tests' own."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llcompile.errors import OptionError
from llcompile.kernels import cache
from llcompile.kernels.description import describe
from llcompile.kernels.operands import Operands
from llcompile.kernels.triton import autotune, engine
from llcompile.kernels.triton.chips import DEFAULT
from llcompile.kernels.triton.description import Description
from llcompile.kernels.triton.launch import Kernel, Launch, kernels_of
from llcompile.kernels.triton.schedule import KERNELS, kernel_names
from llcompile.kernels.triton.tuning import Tuning

pytest.importorskip("triton")

D = Description("scalar", "delta", 64, 128, levels=9)


class Table:
    """A meter that knows every time beforehand."""

    def __init__(self, times: dict[Tuning, float], tight: frozenset[Tuning] = frozenset(), name: str = "chip") -> None:
        self.times, self.tight, self.name, self.asked = times, tight, name, 0
        self.can = True

    def ready(self) -> bool:
        return self.can

    def refused(self, launch: Launch, chosen: Tuning) -> str | None:
        return "no room" if chosen in self.tight else None

    def spilled(self, launch: Launch, chosen: Tuning) -> int:
        return 196

    def milliseconds(self, run) -> float:
        self.asked += 1
        run()
        assert isinstance(Recorded.last, Tuning)
        return self.times.get(Recorded.last, 9.0)


class Recorded(Launch):
    """A launch that only notes with what it was run, and writes where its kernel would."""

    last: Tuning | None = None

    def __call__(self, chosen: Tuning) -> None:
        type(self).last = chosen
        for name, x in zip(self.kernel.parameters, self.arguments, strict=True):
            if name in KERNELS[self.kernel.name].changes and isinstance(x, torch.Tensor):
                x += 1


def launch(programs: int = 48, name: str = "output") -> Recorded:
    kernel = Kernel(D, name, DEFAULT)
    known = {n: torch.zeros(3) if n in KERNELS[name].changes else 0 for n in kernel.parameters}
    return Recorded(kernel, known, programs, D.value_dim)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Generated files and what is tuned stay in the test's folder."""
    monkeypatch.setenv(cache.FOLDER_VARIABLE, str(tmp_path))
    return tmp_path / "tuned"


def test_space():
    """Few candidates, the default first, none of them with tiles beyond V or more than registers hold."""
    for name in kernel_names(D):
        kernel = Kernel(D, name, DEFAULT)
        found = autotune.candidates(kernel)
        assert found[0] == kernel.default
        assert len(found) == len(set(found)) <= 12
        assert all(16 <= c.value_tile <= 128 for c in found)
        assert kernel.tiled or {c.value_tile for c in found} == {kernel.default.value_tile}
    rates = Kernel(Description("rate", "none", 16, 1, levels=16), "rate_scan", DEFAULT)
    assert {c.value_tile for c in autotune.candidates(rates)} == {4, 8, 16}
    wide = Kernel(Description("none", "none", 256, 256), "output", DEFAULT)
    assert all(256 * c.value_tile <= 128 * 32 * c.warps for c in autotune.candidates(wide)[1:])


def test_fastest_that_fits(folder):
    """The fastest is chosen, what has no room is not run, and both are written down."""
    job = launch()
    default, second, third = autotune.candidates(job.kernel)[:3]
    meter = Table({default: 3.0, second: 1.0, third: 2.0}, tight=frozenset([second]))
    assert autotune.best(job, meter) == third
    (file,) = folder.iterdir()
    answer = json.loads(file.read_text())
    assert answer["chosen"] == third._asdict()
    assert {**second._asdict(), "left_out": "no room"} in answer["measured"]
    assert {**default._asdict(), "milliseconds": 3.0, "spilled": 196} in answer["measured"]
    assert answer["question"]["programs"] == "32 to 63"


def test_what_is_wrong_is_not_chosen(folder, caplog):
    """The fastest is tested first; if it is wrong, the next one is taken, and both are written down with why."""
    job = launch()
    default, second, third = autotune.candidates(job.kernel)[:3]
    meter = Table({default: 3.0, second: 1.0, third: 2.0})
    asked = []

    def judge(kernel, chosen):
        asked.append((kernel, chosen))
        return "differs" if chosen == second else None

    with autotune.Judged(judge), caplog.at_level(logging.WARNING, "llcompile.kernels"):
        assert autotune.best(job, meter) == third
        assert autotune.best(launch(), Table({})) == third  # from the file, which was tested
    assert asked == [(job.kernel, second), (job.kernel, third)]
    assert "which is not used: differs" in caplog.text
    (file,) = folder.iterdir()
    measured = json.loads(file.read_text())["measured"]
    assert {**second._asdict(), "milliseconds": 1.0, "spilled": 196, "wrong": "differs"} in measured
    with autotune.Judged(lambda kernel, chosen: "differs"):
        assert autotune.best(launch(64), meter) == default


def test_untested_picks_serve_no_tested_call(folder):
    """What was picked outside of any test is measured again, and tested, for a call that has one."""
    fast, slow = autotune.candidates(launch().kernel)[1:3]
    job, meter = launch(), Table({fast: 1.0})
    assert autotune.best(job, meter) == fast
    meter.times = {slow: 1.0}
    with autotune.Judged(lambda kernel, chosen: None):
        assert autotune.best(job, meter) == slow
    assert len(list(folder.iterdir())) == 2


def test_nothing_fits():
    """Then it is the default, whose own error tells."""
    job = launch()
    assert autotune.best(job, Table({}, tight=frozenset(autotune.candidates(job.kernel)))) == job.kernel.default


def test_measured_once(folder):
    """Neither the same launch again nor another of as many programs is measured; a process later reads the file."""
    meter = Table({})
    autotune.best(first := launch(40), meter)
    asked = meter.asked
    assert asked == len(autotune.candidates(first.kernel))
    autotune.best(Recorded(first.kernel, dict.fromkeys(first.kernel.parameters, 0), 63), meter)
    autotune.best(launch(40), Table({}, tight=frozenset(autotune.candidates(first.kernel))))  # only the file knows
    assert meter.asked == asked
    autotune.best(launch(64), meter)
    assert meter.asked == 2 * asked
    autotune.best(launch(40), other := Table({}, name="another chip"))
    assert other.asked == asked
    assert len(list(folder.iterdir())) == 3


def test_not_now(folder):
    """While a graph is captured the default runs, and nothing is kept; what is on disk is used."""
    meter = Table({})
    meter.can = False
    assert autotune.best(launch(), meter) == launch().kernel.default
    assert not folder.exists()
    fast = autotune.candidates(launch().kernel)[2]
    autotune.best(launch(), Table({fast: 1.0}))
    assert autotune.best(launch(), meter) == fast


@pytest.mark.parametrize("text", ["", "{", "[]", '{"question": {}, "chosen": {"warps": 4}}', None])
def test_damaged_file(folder, caplog, text):
    """It is said which file, and it is measured anew."""
    fast, slow = autotune.candidates(launch().kernel)[1:3]
    autotune.best(launch(), Table({fast: 1.0}))
    (file,) = folder.iterdir()
    if text is None:  # well-formed, but with parameters that nobody would try
        answer = json.loads(file.read_text())
        text = json.dumps({**answer, "chosen": {"value_tile": 7, "warps": 4, "stages": 1}})
    file.write_text(text)
    with caplog.at_level(logging.WARNING, "llcompile.kernels"):
        assert autotune.best(launch(), Table({slow: 1.0})) == slow
    assert file.name in caplog.text
    assert "tuned again" in caplog.text
    assert json.loads(file.read_text())["chosen"] == slow._asdict()


def test_folder_that_cannot_be_written(tmp_path, monkeypatch, caplog):
    """What was tuned holds for the process, and the message names the folder."""
    job = launch()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(cache.FOLDER_VARIABLE, str(tmp_path / "file"))
    fast = autotune.candidates(job.kernel)[1]
    with caplog.at_level(logging.WARNING, "llcompile.kernels"):
        assert autotune.best(job, Table({fast: 1.0})) == fast
    assert cache.FOLDER_VARIABLE in caplog.text


def _in_a_process(folder: str, index: int) -> Tuning:
    os.environ[cache.FOLDER_VARIABLE] = folder
    job = launch()
    return autotune.best(job, Table({autotune.candidates(job.kernel)[1 + index % 2]: 1.0}))


def test_threads_at_once(folder):
    """Each gets an answer, and one whole file is left."""
    jobs = [launch() for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda job: autotune.best(job, Table({})), jobs))
    (file,) = folder.iterdir()
    assert Tuning(**json.loads(file.read_text())["chosen"]) in found


@pytest.mark.slow
def test_processes_at_once(tmp_path, folder):
    """Each gets an answer, and one whole file is left."""
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        found = list(pool.map(_in_a_process, [str(tmp_path)] * 6, range(6)))
    assert set(found) <= set(autotune.candidates(launch().kernel)[1:3])
    (file,) = folder.iterdir()
    assert Tuning(**json.loads(file.read_text())["chosen"]) in found


def test_what_is_changed_is_put_back():
    """A kernel that adds to a buffer finds it as it was, however often it was timed."""
    job = launch(name="chunk_writer_gradient")
    assert "writer_gradients" in KERNELS[job.kernel.name].changes
    autotune.best(job, Table({}))
    known = dict(zip(job.kernel.parameters, job.arguments, strict=True))
    assert torch.equal(known["writer_gradients"], torch.zeros(3))


@pytest.mark.parametrize("value", ["yes", "2"])
def test_switch(monkeypatch, value):
    """What is neither on nor off is an error."""
    monkeypatch.setenv(autotune.VARIABLE, value)
    with pytest.raises(OptionError, match="tune launches on this device"):
        autotune.run(launch())


class Seen(TorchDispatchMode):
    """Notes which torch operations run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func.overloadpacket))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("levels", [None, 9])
def test_a_call_only_allocates_and_launches(delta, levels, monkeypatch):
    """No table is built and no operand is copied: between launches of the forward pass there is nothing but room."""
    q, k, v = (torch.empty(1, 500, 2, 64, device="meta", dtype=torch.bfloat16) for _ in range(3))
    w = None if levels is None else torch.empty(1, 500, 2, levels, device="meta")
    g, b = torch.empty(1, 500, 2, device="meta"), torch.empty(1, 500, 2, device="meta")
    x = Operands(q, k, v, w, g, beta=b if delta else None)
    d = Description.of(describe(x, False))
    for name in kernel_names(d):
        monkeypatch.setattr(kernels_of(d, DEFAULT)[name].code, "function", Nothing())
    with Seen() as seen:
        engine.forward(x, 1.0, False)
    assert set(seen.names) <= {"aten.empty", "aten.new_empty"}
    assert Nothing.launches > 0


class Nothing:
    """A kernel that does nothing."""

    launches = 0

    def __getitem__(self, grid):
        return self

    def __call__(self, *arguments, **options):
        type(self).launches += 1
