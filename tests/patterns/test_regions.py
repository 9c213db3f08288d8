"""Mixers inside the bodies of higher-order calls."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

import llcompile

HEADS, WIDTH = 2, 8
OPTIONS = {"inner": "aot_eager"}


class Mixer(nn.Module):
    """Nobody's model: a gated delta rule between two projections."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(HEADS * WIDTH, 3 * HEADS * WIDTH)
        self.gates = nn.Linear(HEADS * WIDTH, 2 * HEADS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, HEADS, WIDTH)).unbind(2)
        g, beta = self.gates(x).chunk(2, -1)
        log_decay = -torch.nn.functional.softplus(g)
        o, _ = torch_chunk_gated_delta_rule(q, k, v, log_decay, beta.sigmoid(), use_qk_l2norm_in_kernel=True)
        return x + o.flatten(2)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Mixer(), Mixer()])

    def forward(self, x: torch.Tensor, again: bool = True) -> torch.Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if again else layer(x)
        return x


class Conditional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixer = Mixer()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda x: self.mixer(x), lambda x: 2 * x, (x,))


@pytest.mark.usefixtures("fresh_dynamo")
def test_activation_checkpointing_gets_its_level_weights() -> None:
    model, x = Checkpointed(), torch.randn(2, 70, HEADS * WIDTH)
    report = llcompile.convert(model, x)
    assert [c.module for c in report.converted] == ["layers.0", "layers.1"]
    assert {c.level_weights for c in report.converted} == {"linear"}
    with torch.no_grad():
        for layer in model.layers:
            layer.loglinear.weight.normal_(0, 0.3)
    linear = model.layers[1].loglinear.weight
    compiled = torch.compile(model, backend="loglinear", options=OPTIONS)
    results = []
    for again in (True, False):
        model.zero_grad(set_to_none=True)
        output = compiled(x, again)
        output.square().mean().backward()
        results.append((output, linear.grad))
    assert results[0][1].abs().max() > 0
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.usefixtures("fresh_dynamo")
def test_control_flow_is_declined_with_its_name() -> None:
    model, x = Conditional(), torch.rand(2, 70, HEADS * WIDTH)
    with torch.no_grad():
        before = model(x)
        report = llcompile.convert(model, x)
        assert not report.converted
        assert "cond" in report.declined[0].reason
        compiled = torch.compile(model, backend="loglinear", options=OPTIONS)
        torch.testing.assert_close(compiled(x), before)
        torch.testing.assert_close(compiled(-x), -2 * x)
