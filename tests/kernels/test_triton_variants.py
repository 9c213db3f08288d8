"""How many kernels Triton compiles over many lengths, counted by its own keys, without a GPU."""

from __future__ import annotations

import dataclasses
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("triton")

from llcompile.kernels.operands import Operands
from llcompile.kernels.triton import engine
from llcompile.kernels.triton.check import signature_of
from llcompile.kernels.triton.chips import CHIPS
from llcompile.kernels.triton.cost.compilations import key_of
from llcompile.kernels.triton.description import Description
from llcompile.kernels.triton.launch import code_of, kernels_of
from llcompile.kernels.triton.schedule import DECODE, kernel_names
from tests.kernels.kernel_cases import operands
from tests.kernels.launches import recorded, variants

# Lengths that differ in all that Triton looks at: 1, multiples of 16 and odd numbers of tokens, of chunks and of pairs.
LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 96, 128, 129, 640, 1000, 1023, 1024, 1025, 1088, 2048, 2049, 3333, 4096)
FAMILIES = [
    *itertools.product((None, "token", "channel"), (False, True)),
    ("channel", "erase"),
    ("rate", False),
]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Generated files stay in the test's folder."""
    monkeypatch.setenv("LLCOMPILE_KERNEL_DIR", str(tmp_path / "kernels"))


def given(length: int, **case: object) -> Operands:
    """Operands in bfloat16, log decays in float32; nothing is computed from their values."""
    x = operands(length, **{"key_dim": 64, "value_dim": 32, **case})  # type: ignore[arg-type]
    fine = ("log_decay", "decay_rate", "initial_state")
    return Operands(*(t if t is None else t.to(torch.float32 if n in fine else torch.bfloat16) for n, t in x.items()))


def both_passes(x: Operands, final: bool = False):
    """The launches of a forward and a backward pass."""

    def run():
        _, state = engine.forward(x, 1.0, final)
        engine.backward(x, 1.0, x.v, state if final else None)

    return recorded(run)


def heads_first(x: Operands) -> Operands:
    """The same operands as views of memory in the order [B, H, T, ...], as many models have them."""
    moved = (t if t is None or t.dim() < 3 else t.transpose(1, 2).contiguous().transpose(1, 2) for t in x[:-1])
    return Operands(*moved, x[-1])


@pytest.mark.parametrize("levels", [None, 9])
@pytest.mark.parametrize(("decay", "delta"), FAMILIES)
def test_as_many_as_there_are(decay, delta, levels):
    """Forward and backward over all lengths: each kernel once, and every one but those of single tokens."""
    found, described = set(), set()
    for length in LENGTHS:
        launches = both_passes(given(length, decay=decay, delta=delta, levels=levels, batch=1))
        found |= variants(launches)
        described |= {launch.kernel.d for launch in launches}
    names = [name for _, name, _, _ in found]
    assert len(names) == len(set(names)), sorted(n for n in names if names.count(n) > 1)
    (d,) = described
    assert {*names} == {*kernel_names(d)} - {*DECODE}


@pytest.mark.parametrize(
    "case",
    [
        {"levels": 9, "delta": True, "batch": 3, "heads": 2, "groups": 1},
        {"levels": 9, "delta": True, "batch": 2, "key_dim": 33, "value_dim": 17},
        {"levels": 5, "decay": "channel", "batch": 1, "heads": 1, "groups": 1, "key_dim": 48, "value_dim": 80},
        {"levels": 5, "decay": "rate", "batch": 2, "heads": 6, "key_dim": 16, "value_dim": 1},
    ],
)
@pytest.mark.parametrize("layout", ["tokens first", "heads first"])
def test_other_sizes_and_layouts(case, layout):
    """Batches, one head, sizes that are no multiples of 16, views: still each kernel once."""
    found = set()
    for length in LENGTHS[:16]:
        x = given(length, **case)
        found |= variants(both_passes(x if layout == "tokens first" else heads_first(x)))
    names = [name for _, name, _, _ in found]
    assert len(names) == len(set(names)), sorted(n for n in names if names.count(n) > 1)


@pytest.mark.parametrize("state", ["linear", "level"])
def test_with_states(state):
    """Rows that continue and end in a state."""
    found = set()
    for length in (1, 16, 65, 640, 1024, 1025):
        found |= variants(both_passes(given(length, delta=True, levels=9, state=state), final=True))
    names = [name for _, name, _, _ in found]
    assert len(names) == len(set(names)), sorted(n for n in names if names.count(n) > 1)


def test_descriptions_share_what_has_the_same_text():
    """Calls with and without a final state, and with a linear state before them, compile few kernels of their own."""
    calls = {
        (state, final): given(640, delta=True, levels=9, state=state) for state in (None, "linear") for final in (0, 1)
    }
    found = {key: variants(both_passes(x, bool(key[1]))) for key, x in calls.items()}
    plain = found[None, 0]
    assert {name for _, name, *_ in found[None, 1] - plain} == {
        "final_state",
        "final_state_gradient",
        "final_chunk_gradient",
    }
    assert {name for _, name, *_ in found["linear", 0] - plain} == {"old_state_gradient"}
    # What has another text is another kernel: rows that continue anywhere have offsets.
    shared = {name for _, name, *_ in plain & variants(both_passes(given(640, delta=True, levels=9, state="level")))}
    assert shared == {"tree_up", "tree_down", "transition_gradient", "transition_down"}
    d = dataclasses.replace(next(iter(both_passes(calls[None, 0]))).kernel.d, final_state=True)
    assert code_of(d, "chunk_inverse") in {code for code, *_ in plain}


def test_without_it_there_are_many(monkeypatch):
    """The count sees what it is for: with all arguments specialised, the same lengths take many more kernels."""
    from llcompile.kernels.triton import launch, source

    for cached in (source.generate, source.kernel_text, launch.module_of, launch.kernels_of):
        cached.cache_clear()
    monkeypatch.setattr(source, "_without_specialisations", lambda text, name, d: text)
    found = set()
    for length in LENGTHS:
        found |= variants(both_passes(given(length, delta=True, levels=9, batch=1)))
    for cached in (source.generate, source.kernel_text, launch.module_of, launch.kernels_of):
        cached.cache_clear()
    assert len(found) > 3 * len({name for _, name, _, _ in found})


def test_aligned_rows_are_known_to_be():
    """Rows of K and V at multiples of 16 keep what lets a kernel load many numbers at a time; others are copied."""
    x = given(100, delta=True, levels=9)
    wide = torch.zeros(*x.q.shape[:3], 70, dtype=x.q.dtype)
    odd = x._replace(q=wide[..., 3:67])  # its rows begin at odd places
    keys = {}
    for name, operand in (("even", x), ("odd", odd)):
        launches = both_passes(operand)
        keys[name] = variants(launches)
        (output,) = (launch for launch in launches if launch.kernel.name == "output")
        known = dict(zip(output.kernel.parameters, key_of(output), strict=False))
        assert known["query_ptr"] == ("*bf16", "D")
        assert {known[f"query_{part}"] for part in ("row", "token", "head")} == {("i32", "D")}
        assert known["tokens"] == ("i32", None)
        assert known["weight_row"] == ("i32", None)
    assert keys["even"] == keys["odd"]


@pytest.mark.parametrize(
    "d",
    [
        Description("scalar", "delta", 64, 32, repeat=2, levels=9),
        Description("channel", "none", 33, 17, levels=None),
        Description("rate", "none", 16, 1, repeat=4, levels=5),
    ],
)
def test_what_is_compiled_for_the_table_is_what_is_launched(d):
    """The types and multiples of `kernels matrix` are those of real launches, argument by argument."""
    decay = {"none": None, "scalar": "token"}.get(d.decay, d.decay)
    sizes = {"key_dim": d.key_dim, "value_dim": d.value_dim, "groups": 2, "heads": 2 * d.repeat}
    x = given(200, decay=decay, delta=d.delta, levels=d.levels, **sizes)
    for launch in both_passes(x):
        kernel = launch.kernel
        signature, constants, aligned = signature_of(kernel.d, kernel.name, CHIPS["sm_90"], kernel.default)
        assert constants == ({"VALUE_TILE": kernel.default.value_tile} if kernel.tiled else {})
        found = {
            name: (kind, "D" if name in aligned else None) for name, kind in signature.items() if name not in constants
        }
        assert found == dict(zip(kernel.parameters, key_of(launch), strict=False)), kernel.name


def test_threads_with_new_descriptions():
    """Eight threads that need the same new kernels at once all get them whole."""
    sets = itertools.product(("none", "scalar", "channel"), ("none", "delta"), (24, 40), (None, 3, 5))
    wanted = [Description(*row[:2], row[2], 8, levels=row[3]) for row in sets]
    start = threading.Barrier(8)

    def load(number: int) -> list[str]:
        start.wait()
        return [kernels_of(d, CHIPS["sm_90"])[name].name for d in wanted for name in kernel_names(d)]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(load, range(8)))
    assert found == [[name for d in wanted for name in kernel_names(d)]] * 8
