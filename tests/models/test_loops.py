"""Loops over chunks: however the pieces are taken and put back, it is the same mixer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from tests.models.written import WIDTH, Function, mix, moves, same

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

CHUNK = 4
Take = Callable[[Tensor], Sequence[Tensor]]
Put = Callable[[list[Tensor], Tensor], Tensor]


def _rows_written(outs: list[Tensor], like: Tensor, order: int = 1) -> Tensor:
    rows = like.new_zeros(len(like), len(outs), CHUNK, WIDTH)
    for i, out in enumerate(outs[::order]):
        rows[:, i] = out
    return rows.flatten(1, 2)


def _slices_written(outs: list[Tensor], like: Tensor) -> Tensor:
    made = torch.empty_like(like)
    for i, out in enumerate(outs):
        made[:, CHUNK * i : CHUNK * (i + 1)] = out
    return made


TAKES: dict[str, Take] = {
    "narrow": lambda x: [x.narrow(1, i, CHUNK) for i in range(0, x.shape[1], CHUNK)],
    "unflatten": lambda x: [x.unflatten(1, (-1, CHUNK)).select(1, i) for i in range(x.shape[1] // CHUNK)],
    "tensor_split": lambda x: x.tensor_split(x.shape[1] // CHUNK, dim=1),
}
PUTS: dict[str, Put] = {
    "cat": lambda outs, like: torch.cat(outs, dim=1),
    "rows written": _rows_written,
    "slices written": _slices_written,
}


def chunked(take: Take, put: Put) -> Function:
    """Linear attention in chunks."""

    def function(layer: object, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        state, outs = x.new_zeros(len(x), WIDTH, WIDTH), []
        for a, b, c in zip(take(q), take(k), take(v), strict=True):
            outs.append(mix(a, b, c) + a @ state)
            state = state + b.transpose(-1, -2) @ c
        return put(outs, x)

    return function


@pytest.mark.parametrize("length", [8, WIDTH, 20])
@pytest.mark.parametrize("put", PUTS)
@pytest.mark.parametrize("take", TAKES)
def test_chunks(take: str, put: str, length: int) -> None:
    report, model = same(chunked(TAKES[take], PUTS[put]), length=length)
    assert [c.family for c in report.converted] == ["linear attention"], str(report)
    assert moves(model, length=length) > 1e-3


@pytest.mark.parametrize("put", ["cat", "rows written"])
def test_chunks_put_back_in_another_order(put: str) -> None:
    """The control: outputs of late tokens stand first, so it looks ahead."""
    turned: dict[str, Put] = {
        "cat": lambda outs, like: torch.cat(outs[::-1], dim=1),
        "rows written": lambda outs, like: _rows_written(outs, like, order=-1),
    }
    report, _ = same(chunked(TAKES["unflatten"], turned[put]), length=20)
    assert not report.converted
    assert report.declined
