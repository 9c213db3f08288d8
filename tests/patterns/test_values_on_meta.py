"""A model on the device meta: a property of numbers that nobody has is not said to fail."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from torch import Tensor, nn

import llcompile
from llcompile.patterns.structure import probe
from llcompile.patterns.structure.lifted import LiveIn

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


def experts() -> nn.Module:
    """transformers' qwen3_next with one layer, whose experts are more numbers than a proof may draw at random."""
    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    }
    heads = {f"linear_num_{name}_heads": 2 for name in ("key", "value")}
    dims = {f"linear_{name}_head_dim": 8 for name in ("key", "value")}
    more = {"num_experts": 512, "moe_intermediate_size": 4096, "vocab_size": 64, "intermediate_size": 64}
    config = transformers.AutoConfig.for_model("qwen3_next", **sizes, **heads, **dims, **more)
    with torch.device("meta"):
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    return model.eval()


def test_weights_of_many_experts_are_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Full-size mixtures of experts are looked at in seconds and in little memory."""
    draw = probe.Probe.draw

    def counted(self: probe.Probe, live_in: LiveIn) -> Tensor:
        assert math.prod(self.shape(live_in)) < 2**20
        return draw(self, live_in)

    monkeypatch.setattr(probe.Probe, "draw", counted)
    ids = torch.zeros(1, LENGTH, dtype=torch.long, device="meta")
    report = llcompile.inspect(experts(), ids, use_cache=False).report
    assert (len(report.converted), len(report.declined)) == (1, 0)
