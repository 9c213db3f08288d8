"""The forward pass in blocks of chunks: the same output as chunk by chunk, and when it is taken."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

pytest.importorskip("triton")

from llcompile.kernels.triton import blocks
from llcompile.kernels.triton.description import Description
from tests.kernels import triton_cases
from tests.kernels.interpreting import interpreter

SCALAR = Description("scalar", "none", 64, 64, levels=17)


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessPoolExecutor]:
    """A process where the interpreter is on from the start."""
    with interpreter(tmp_path_factory.mktemp("kernels")) as pool:
        yield pool


@pytest.mark.parametrize(
    ("walk", "length", "case"),
    [
        (4, 64 * 9 + 5, {"decay": "token", "levels": 9}),  # two whole blocks, and one of two chunks
        (4, 64 * 9 + 5, {"decay": None, "levels": 4}),  # fewer levels than needed: the last one serves the rest
        pytest.param(2, 64 * 7, {"decay": "token", "levels": 12, "heads": 4, "groups": 2}, marks=pytest.mark.slow),
        pytest.param(16, 64 * 35 + 3, {"decay": "token", "levels": 13}, marks=pytest.mark.slow),
        (2, 64 * 7 + 5, {"decay": "token", "levels": 9, "delta": True}),
        *(
            pytest.param(*wanted, marks=pytest.mark.slow)
            for wanted in (
                # Fewer levels than needed; a block that takes three states over one another; as many heads as groups.
                (4, 64 * 13 + 5, {"decay": None, "levels": 4, "delta": True}),
                (2, 64 * 15 + 3, {"decay": "token", "levels": 12, "heads": 4, "groups": 2, "delta": True}),
                (16, 64 * 35 + 3, {"decay": "token", "levels": 13, "delta": True}),
                # Keys and values of odd sizes, and wider than a tile.
                (2, 64 * 7, {"decay": "head", "levels": 9, "delta": True, "key_dim": 21, "value_dim": 70}),
                # States pass 15 chunks and are rounded as often as they are multiplied, not as they are kept.
                (16, 64 * 33, {"decay": None, "levels": 12, "delta": True, "dtype": torch.bfloat16}),
                (16, 64 * 33, {"decay": "token", "levels": 12, "delta": True, "dtype": torch.float16}),
            )
        ),
        *(
            # Without decays all that was joined is read: states of low levels are kept in the operands' dtype.
            pytest.param(16, 64 * 18, {"decay": None, "levels": 12, "dtype": dtype}, marks=pytest.mark.slow)
            for dtype in (torch.bfloat16, torch.float16)
        ),
    ],
)
def test_definition(worker: ProcessPoolExecutor, walk: int, length: int, case: dict[str, object]) -> None:
    """Within the budget of the dtype, in poisoned buffers, and next to what the other form gives."""
    case = {"dtype": torch.float32, "batch": 1, "groups": 1, "heads": 1, "length": length, "delta": False, **case}
    error, budget, apart = worker.submit(triton_cases.errors_in_blocks, case, None, walk).result()
    assert error <= budget
    assert apart <= budget


@pytest.mark.parametrize("delta", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_padded_rows(worker: ProcessPoolExecutor, delta: bool) -> None:
    """Rows that end within a block, and one before its second block."""
    case = {"dtype": torch.float32, "batch": 3, "groups": 1, "heads": 1, "length": 64 * 5, "decay": "token"}
    lengths = [64 * 5, 64 * 3 + 7, 20]
    found = worker.submit(triton_cases.errors_in_blocks, {**case, "delta": delta, "levels": 9}, lengths, 2).result()
    assert found[0] <= found[1]


@pytest.mark.parametrize(
    "changes",
    [
        {"levels": None},
        {"decay": "channel"},
        {"correction": "erase"},
        {"correction": "delta", "dtype": torch.float32},
        {"correction": "delta", "decay": "channel"},
        {"correction": "delta", "final_state": True},
        {"initial_state": "level"},
        {"final_state": True},
        {"packed": True},
    ],
    ids=str,
)
def test_what_goes_chunk_by_chunk(changes: dict[str, object]) -> None:
    """Families and calls that have tables for chunks, or matrices for them."""
    assert blocks.serves(SCALAR, 1, 65536, 32)
    assert blocks.serves(dataclasses.replace(SCALAR, correction="delta"), 1, 65536, 32)
    assert not blocks.serves(dataclasses.replace(SCALAR, **changes), 1, 65536, 32)  # type: ignore[arg-type]


def test_short_calls_keep_a_program_for_each_chunk() -> None:
    """Where blocks are too few for a large chip."""
    assert blocks.serves(SCALAR, 1, 8 * 1024, 32)
    assert not blocks.serves(SCALAR, 1, 8 * 1024 - 1, 32)
    assert blocks.serves(SCALAR, 8, 1024, 32)
