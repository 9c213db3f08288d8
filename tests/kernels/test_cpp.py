"""What is special to the C++ kernels: threads, kept states, vectors of other widths. The rest is in test_operator."""

from __future__ import annotations

import ctypes
import itertools
import re
import sys
import threading
from pathlib import Path

import pytest
import torch

from llcompile.errors import StateError
from llcompile.kernels import choice, header
from llcompile.kernels.cpp import build, engine, family
from llcompile.kernels.cpp.call import Call, Operand, Step
from llcompile.kernels.cpp.compiler import find
from llcompile.kernels.cpp.source import Family, generate
from llcompile.kernels.reference import reference_attention
from llcompile.kernels.state import pack_state
from llcompile.ops import loglinear_attention, loglinear_attention_step
from tests.kernels.kernel_cases import Operands, assert_agrees, both, operands, relative_error

FAMILIES = [*itertools.product(("none", "scalar", "channel"), ("none", "delta", "erase")), ("rate", "none")]


@pytest.fixture(autouse=True)
def _cpp():
    with choice.use("cpp"):
        yield


def _results(x: Operands) -> list[torch.Tensor]:
    """Output, final state and all gradients."""
    leaves = {n: t if t is None else t.clone().requires_grad_() for n, t in x.items()}
    o, state = loglinear_attention(**leaves, return_final_state=True)
    inputs = [t for t in leaves.values() if t is not None]
    return [o, state, *torch.autograd.grad((o.sin().sum(), state.sin().sum()), inputs)]


@pytest.mark.parametrize("struct", [Call, Step, Operand])
@pytest.mark.parametrize(("decay", "correction"), FAMILIES)
def test_structs_have_the_same_fields(struct, decay, correction):
    """Python fills them field by field, and nothing else would notice that C++ has another order."""
    source = generate(Family(decay, correction, torch.float32))
    body = re.search(rf"struct {struct.__name__} {{\n(.*?)\n}};", source, re.DOTALL)[1]
    lines = (line.partition("//")[0].strip().rstrip(";") for line in body.splitlines())
    names = [re.split(r"[\s*&]+", part.strip())[-1] for line in lines if line for part in line.split(",")]
    assert names == [name for name, _ in struct._fields_]


def test_the_same_bits_every_time(threads):
    x = operands(150, "token", True, 9, "level", dtype=torch.float32)
    for count in (1, 2):
        threads(count)
        first, second = _results(x), _results(x)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_threads_are_those_of_torch():
    """A second OpenMP library would have threads of its own, as many as there are cores, whatever torch was told."""
    _results(operands(10))
    maps = Path("/proc/self/maps").read_text().splitlines()
    assert len({line.split()[-1] for line in maps if "gomp" in line}) == 1


@pytest.mark.parametrize("heads", [4, 6])
def test_heads_of_a_group_are_shared_among_threads(threads, heads):
    """One group and more threads than rows: each thread sums gradients of query and key over its own heads."""
    x = operands(70, "token", False, 9, batch=1, groups=1, heads=heads)
    for count in (1, 2, 3, 8):
        threads(count)
        assert_agrees(x)


@pytest.mark.parametrize(
    ("decay", "delta"), [*itertools.product([None, "token", "channel"], [False, True]), ("channel", "erase")]
)
@pytest.mark.parametrize(("levels", "state"), [(None, "linear"), (9, "level"), (4, "linear"), (9, None)])
def test_a_sequence_is_cut_where_heads_are_fewer_than_threads(threads, monkeypatch, decay, delta, levels, state):
    """Segments of any number of chunks, none in some of them, and padding: what one thread gives."""
    monkeypatch.setattr(engine, "SEGMENT", 64)
    x = operands(450, decay, delta, levels, state, batch=2, groups=1, heads=1)
    mask = torch.ones(2, 450, dtype=torch.bool)
    mask[1, 70:] = False
    for options in ({}, {"attention_mask": mask}):
        threads(1)
        whole = loglinear_attention(**x, return_final_state=True, **options)
        for count in (5, 16):
            threads(count)
            for ours, other in zip(loglinear_attention(**x, return_final_state=True, **options), whole, strict=True):
                assert relative_error(ours, other) <= 1e-12


@pytest.mark.parametrize("decay", [None, "token", "channel"])
@pytest.mark.parametrize("levels", [None, 9])
@pytest.mark.parametrize("kept", [0, 3, 20])
def test_states_that_do_not_fit_are_computed_again(monkeypatch, decay, levels, kept):
    """A backward pass in segments, each from a checkpoint: the same gradients, bit by bit."""
    x = operands(500, decay, True, levels, "level" if levels else "linear")
    whole = _results(x)
    monkeypatch.setattr(engine, "KEPT", kept * 8 * 4 * 8)  # K = 5 and V = 3 are padded to whole vectors
    assert all(torch.equal(a, b) for a, b in zip(whole, _results(x), strict=True))


def test_kept_states_are_bounded(monkeypatch):
    """The room for states is what `KEPT` says and not what the sequence asks for."""
    taken = []
    call = engine.Call
    monkeypatch.setattr(engine, "Call", lambda **fields: taken.append(fields["kept"]) or call(**fields))
    _results(operands(100))
    assert taken == [engine.KEPT, engine.KEPT]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("decay", [None, "token", "channel"])
def test_operands_of_other_dtypes(dtype, decay):
    """Each operand has a dtype of its own: level weights and decays of a bfloat16 model are often float32."""
    x = operands(100, decay, True, 8, dtype=torch.float32, key_dim=17, value_dim=9)
    mixed = {n: t.to(dtype) if n in ("q", "k", "v") else t for n, t in x.items() if t is not None}
    budget = 200 * torch.finfo(torch.float32).eps + 2 * torch.finfo(dtype).eps  # the output's gradient is rounded
    for name, (ours, definition) in both({**x, **mixed}).items():
        assert relative_error(ours, definition) <= budget, name


def test_operands_with_strides():
    """Memory as it comes: transposed heads, every other channel, an expanded batch."""
    x = operands(80, "token", True, 8)
    odd = dict(x)
    for name in ("q", "k", "v", "level_weights"):
        odd[name] = torch.stack([x[name], x[name]], -1)[..., 0].transpose(1, 2).contiguous().transpose(1, 2)
        assert not odd[name].is_contiguous()
    odd["beta"] = x["beta"][:1].expand(2, -1, -1)
    assert_agrees(odd)


def test_a_step_from_any_position():
    """The header is read and written in C++; the token after it is the definition's."""
    for entries, (key_dim, value_dim) in {6: (3, 2), 15: (5, 3)}.items():
        for position in (0, 1, 7, 8, 255, 4096, 2**20 - 1, 2**22 + 5):
            x = operands(1, "token", True, 6, batch=1, key_dim=key_dim, value_dim=value_dim)
            states = torch.randn(1, 4, 6, key_dim, value_dim, dtype=torch.float64)
            x["initial_state"] = pack_state(states, torch.tensor([position]))
            assert header.has_digits(entries) == (entries >= header.DIGITS)
            token = {n: t[:, 0] for n, t in x.items() if n != "initial_state" and t is not None}
            o, state = loglinear_attention_step(**token, state=x["initial_state"])
            expected, final = reference_attention(**x, return_final_state=True)
            torch.testing.assert_close(o, expected[:, 0], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(state, final, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("value", [0.5, -1.0, 9.0, float("nan"), float("inf")])
def test_a_damaged_header_is_an_error(value):
    x = operands(1, "token", False, 6, batch=2)
    state = pack_state(torch.zeros(2, 4, 6, 5, 3, dtype=torch.float64), torch.tensor([3, 5]))
    state[1, :, 0, 0, 1] = value
    token = {n: t[:, 0] for n, t in x.items() if n != "initial_state" and t is not None}
    with pytest.raises(StateError, match="has lost the position of row 1"):
        loglinear_attention_step(**token, state=state)


def test_many_threads_call_at_once():
    """Each call has buffers of its own."""
    x = operands(200, "channel", True, 9)
    expected, _ = loglinear_attention(**x)
    wrong = []

    def run() -> None:
        with choice.use("cpp"):
            for _ in range(5):
                if not torch.equal(loglinear_attention(**x)[0], expected):
                    wrong.append(1)

    running = [threading.Thread(target=run) for _ in range(6)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize("sums", [torch.float32, torch.float64])
@pytest.mark.parametrize(("decay", "correction"), FAMILIES)
def test_vectors_of_another_width(tmp_path, monkeypatch, decay, correction, sums):
    """The same source for a CPU with narrower vectors, without a warning; tests elsewhere run this CPU's own."""
    compiler = find()
    flags = tuple("-march=x86-64-v2" if flag == "-march=native" else flag for flag in compiler.flags)
    assert flags != compiler.flags, "this test needs a compiler that takes -march=native"
    source = tmp_path / "narrow.cpp"
    source.write_text(generate(Family(decay, correction, sums)))
    content = build.compiled(
        source, compiler._replace(flags=(*flags, "-Wall", "-Wextra", "-Werror", "-Wno-unused-function"))
    )
    library = tmp_path / "narrow.so"
    library.write_bytes(content)
    loaded = ctypes.CDLL(str(library))
    narrow = family.Functions(*(family._function(loaded, name, s) for name, s in family._STRUCTS.items()))
    kinds = {"none": None, "scalar": "token", "delta": True}
    x = operands(150, kinds.get(decay, decay), kinds.get(correction, correction), 9, dtype=sums)
    wide = _results(x)
    monkeypatch.setattr(engine, "functions", lambda d: narrow)
    for ours, other in zip(_results(x), wide, strict=True):
        assert relative_error(ours, other) <= 200 * torch.finfo(sums).eps
