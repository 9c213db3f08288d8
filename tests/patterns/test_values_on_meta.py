"""A model on the device meta: a property of numbers that nobody has is not said to fail."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import llcompile

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

WIDTH, LENGTH = 16, 24


class Masked(nn.Module):
    """Linear attention with a table of weights as a buffer."""

    kept: Tensor

    def __init__(self, kept: Tensor, softmax: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.softmax = softmax
        self.register_buffer("kept", kept)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).mT
        scores = (scores + self.kept).softmax(-1) if self.softmax else scores * self.kept
        return scores @ self.v(x)


class Open(Masked):
    """No mask at all."""

    def forward(self, x: Tensor) -> Tensor:
        return (self.q(x) @ self.k(x).mT) @ self.v(x) * self.kept[0, 0]


def codes(model: nn.Module, device: str) -> list[str]:
    report = llcompile.inspect(model.to(device), torch.randn(2, LENGTH, WIDTH, device=device)).report
    return [record.code for record in report.declined] or [f"{len(report.converted)} converted"]


def test_a_mask_without_numbers_decides() -> None:
    """On the CPU one converts and the other is declined for what it is; on meta neither is known."""
    causal, window = torch.ones(LENGTH, LENGTH).tril(), torch.ones(LENGTH, LENGTH).tril().triu(-3)
    assert codes(Masked(causal), "cpu") == ["1 converted"]
    assert codes(Masked(window), "cpu") == ["sliding-window"]
    assert [codes(Masked(mask), "meta") for mask in (causal, window)] == [["no-values"]] * 2


def test_what_no_numbers_decide_is_said_as_ever() -> None:
    report = llcompile.inspect(Open(torch.ones(1, 1)).to("meta"), torch.randn(2, LENGTH, WIDTH, device="meta")).report
    assert [record.code for record in report.declined] == []
    assert "bidirectional" in str(report) or "both directions" in str(report), report
