"""Compiled kernels that are run without Triton's look-up: only for launches that Triton would run the same one for."""

from __future__ import annotations

import threading
from collections import defaultdict
from concurrent.futures import Future

import pytest
import torch

pytest.importorskip("triton")

from llcompile.kernels.operands import Operands
from llcompile.kernels.triton import engine
from llcompile.kernels.triton.chips import CHIPS
from llcompile.kernels.triton.cost.compilations import key_of
from llcompile.kernels.triton.direct import Kinds
from llcompile.kernels.triton.launch import Launch
from tests.kernels.kernel_cases import operands
from tests.kernels.launches import recorded

NUMBERS = (-16, -1, 0, 1, 2, 15, 16, 17, 48, 2**31 - 1, 2**31 - 16, 2**31, 2**31 + 1, 2**33, -(2**31) - 16)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Generated files stay in the test's folder, and kernels are compiled."""
    monkeypatch.setenv("LLCOMPILE_KERNEL_DIR", str(tmp_path / "kernels"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def launches(tokens=70, sizes=16, levels=8):
    """Those of a backward pass, as they come."""
    case = operands(tokens, dtype=torch.float32, delta=True, levels=levels, key_dim=sizes, value_dim=sizes)
    x = Operands(*case.values(), None)
    return recorded(lambda: engine.backward(x, 1.0, x.v, None))


def tensors_like(x):
    """Aligned, not aligned, and of another dtype."""
    plain = torch.zeros(64, dtype=x.dtype)
    return plain, plain[1:], torch.zeros(64, dtype=torch.bfloat16), torch.zeros(64, dtype=torch.bfloat16)[1:]


def variants(launch):
    """`launch`, and with each of its arguments, and pairs of neighbours, changed in every way that Triton looks at."""
    choices = [
        tensors_like(x) if isinstance(x, torch.Tensor) else NUMBERS if type(x) is int else (x, 0.25)
        for x in launch.arguments
    ]
    yield launch
    for i, found in enumerate(choices):
        for j in (i, (i + 1) % len(choices)):
            for one in found:
                for other in choices[j] if j != i else (one,):
                    changed = list(launch.arguments)
                    changed[i], changed[j] = one, other
                    yield with_arguments(launch, changed)


def with_arguments(launch, arguments):
    new = Launch.__new__(Launch)
    new.kernel, new.programs, new.columns, new.arguments = launch.kernel, launch.programs, launch.columns, arguments
    return new


@pytest.mark.parametrize("sizes", [16, 12], ids=["rows that Triton knows to be aligned", "others"])
def test_kinds_are_at_least_as_fine_as_tritons(sizes):
    """One kind has one compiled kernel, whatever changes in its arguments; and kinds differ where Triton's do."""
    by_name = {launch.kernel.name: launch for launch in launches(300, sizes)}
    for name in ("chunk_state", "tree_up", "chunk_gradient"):
        kinds, keys = defaultdict(set), set()
        for one in variants(by_name[name]):
            key = key_of(one)
            kinds[one.kernel.code.kinds.of(one.arguments)].add(key)
            keys.add(key)
        assert all(len(found) == 1 for found in kinds.values())
        assert len(kinds) >= len(keys) > 10


@pytest.mark.parametrize("chip", ["gfx942", "sm_90"])
def test_memory_that_offsets_of_32_bits_do_not_reach(chip):
    """For AMD's chips, Triton compiles a kernel anew for a buffer of 2 GB: the one before would not reach its end."""
    one = next(launch for launch in launches() if launch.kernel.name == "chunk_state")
    plain, found = one.kernel.code.function.do_not_specialize, set()
    kinds = Kinds(one.kernel.parameters, plain, measured=chip == "gfx942")
    for i, x in enumerate(one.arguments):
        if not isinstance(x, torch.Tensor):
            continue
        keys = {}
        for numbers in (2**29 - 1, 2**29):  # of 4 bytes
            changed = list(one.arguments)
            changed[i] = torch.empty(numbers, dtype=x.dtype if x.element_size() == 4 else torch.float32, device="meta")
            keys.setdefault(kinds.of(changed), set()).add(key_of(with_arguments(one, changed), CHIPS[chip]))
        assert all(len(key) == 1 for key in keys.values())
        found.add(len(keys))
    assert (2 in found) == (chip == "gfx942")


def test_another_device_is_another_kind():
    """Triton loads a kernel once for each."""
    (one, *_) = launches()
    elsewhere = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in one.arguments]
    kinds = one.kernel.code.kinds
    assert kinds.of(one.arguments) != kinds.of(elsewhere)


class Function:
    """In place of Triton's function, and of what it compiles: writes down how each launch came."""

    do_not_specialize: tuple[str, ...] = ()

    def __init__(self):
        self.looked_up, self.ran = [], []

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.looked_up.append((grid, arguments, options))
            return Compiled(self)

        return launch


class Compiled:
    def __init__(self, function):
        self.function = function

    def __getitem__(self, grid):
        return lambda *arguments: self.function.ran.append((grid, arguments))


@pytest.fixture
def one(monkeypatch):
    """A launch whose kernel compiles nothing, and its function."""
    launch = next(x for x in launches() if x.kernel.tiled)
    function = Function()
    monkeypatch.setattr(launch.kernel.code, "function", function)
    monkeypatch.setattr(launch.kernel.code, "compiled", {})
    return launch, function


def test_the_first_launch_goes_through_triton(one):
    """The others run what it compiled, with the same grid and arguments, the value tile last."""
    launch, function = one
    default = launch.kernel.default
    for _ in range(3):
        launch(default)
    ((grid, arguments, options),) = function.looked_up
    assert options["VALUE_TILE"] == default.value_tile
    assert function.ran == [(grid, (*arguments, default.value_tile))] * 2
    launch(default._replace(warps=2))
    assert len(function.looked_up) == 2


def test_promises_are_kept(one):
    """What Triton gives back inside of its `AsyncCompileMode` cannot be launched; its result can."""
    launch, function = one

    class Later(Function):
        def __getitem__(self, grid):
            def launch(*arguments, **options):
                future = Future()
                future.set_result(Compiled(function))
                return future

            return launch

    launch.kernel.code.function = Later()
    for _ in range(3):
        launch(launch.kernel.default)
    assert len(function.ran) == 2


def test_lengths_make_no_kinds(monkeypatch):
    """Whatever the number of tokens, no kernel has more compiled forms than before."""
    found = defaultdict(set)
    for tokens in (1, 2, 15, 16, 17, 63, 64, 65, 128, 1000, 1024, 1025):
        for launch in launches(tokens):
            found[launch.kernel.name].add(launch.kernel.code.kinds.of(launch.arguments))
    assert found.keys() >= {"chunk_state", "tree_up"}
    assert max(map(len, found.values())) == 1


def test_threads(one):
    """Launches of eight threads all arrive, and one form is kept."""
    launch, function = one
    start = threading.Barrier(8)

    def work():
        start.wait()
        for _ in range(50):
            launch(launch.kernel.default)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(function.looked_up) + len(function.ran) == 8 * 50
    assert len(function.looked_up) <= 8
    assert len(launch.kernel.code.compiled) == 1


def test_the_interpreter_keeps_nothing(monkeypatch, one):
    """It compiles nothing."""
    launch, function = one
    monkeypatch.setattr(launch.kernel.code, "compiled", None)
    launch(launch.kernel.default)
    launch(launch.kernel.default)
    assert len(function.looked_up) == 2
    assert not function.ran
