"""Tensors of a CUDA device that is not there."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llcompile.torch_internals.fake_device import FAKE, Indexing, fake_cuda


def test_tensors_are_on_the_device() -> None:
    """Shapes and dtypes are those of results there; a plain tensor is what it was afterwards."""
    with fake_cuda():
        x = torch.empty(2, 3, dtype=torch.bfloat16, device="cuda")
        y = torch.empty(3, 4, dtype=torch.bfloat16, device="cuda")
        found = x @ y
    assert isinstance(found, FAKE)
    assert (found.device.type, found.shape, found.dtype) == ("cuda", (2, 4), torch.bfloat16)
    assert not isinstance(torch.ones(1), FAKE)


@pytest.mark.parametrize(
    "index",
    [0, -1, None, slice(1, 3), (slice(None), 0), (slice(None), None), (..., None), (0, ..., slice(2)), (..., 1, None)],
    ids=str,
)
def test_indexing(index: object) -> None:
    """As of a tensor that is there, also inside of an operator that a mode runs."""
    want = torch.empty(4, 5, 6)[index]  # type: ignore[index]

    class Inside(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            with Indexing():
                found.append(args[0][index])
            return func(*args, **(kwargs or {}))

    found: list[torch.Tensor] = []
    with fake_cuda():
        x = torch.empty(4, 5, 6, device="cuda")
        found.append(x[index])  # type: ignore[index]
        with Inside():
            torch.neg(x)
    assert [(y.shape, y.stride(), y.storage_offset()) for y in found] == [
        (want.shape, want.stride(), want.storage_offset())
    ] * 2
