"""As many tokens as a mixer has channels, heads or rows: the axes are still told apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import llcompile

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

K, V = 3, 6


class Chunks(nn.Module):
    """Chunks of four tokens, put together; then one channel of the output is written to."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, K), nn.Linear(8, K), nn.Linear(8, V)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        state, outs = x.new_zeros(len(x), K, V), []
        for qc, kc, vc in zip(q.split(4, 1), k.split(4, 1), v.split(4, 1), strict=True):
            outs.append((qc @ kc.mT).tril() @ vc + qc @ state)
            state = state + kc.mT @ vc
        o = torch.cat(outs, 1) + 0
        o[..., 0].add_(1.0)
        return o


@pytest.mark.parametrize("tokens", [V, V + 1, V - 1], ids=["as many tokens as channels", "more", "fewer"])
def test_a_channel_written_to_is_not_taken_for_a_token(tokens: int) -> None:
    report = llcompile.inspect(Chunks(), torch.randn(2, tokens, 8)).report
    assert [(c.key_dim, c.value_dim) for c in report.converted] == [(K, V)], str(report)
