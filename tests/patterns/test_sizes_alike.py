"""As many tokens as a mixer has channels, heads or rows: the axes are still told apart."""

from __future__ import annotations

from collections.abc import Callable

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


class Tokens(Chunks):
    """Token by token; then some channels of the output are written to, and it is projected."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(V, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        state, outs = x.new_zeros(len(x), K, V), []
        for i in range(x.shape[1]):
            state = state + k[:, i, :, None] * v[:, i, None]
            outs.append((q[:, i, :, None] * state).sum(1))
        o = torch.stack(outs, 1)
        half = o[..., : V // 2]
        half *= 2.0
        return self.out(o)


@pytest.mark.parametrize("layer", [Chunks, Tokens])
@pytest.mark.parametrize("tokens", [V, V + 1, V // 2], ids=["as many tokens as channels", "more", "as many rows"])
def test_a_channel_written_to_is_not_taken_for_a_token(layer: type[Chunks], tokens: int) -> None:
    report = llcompile.inspect(layer(), torch.randn(2, tokens, 8)).report  # 2 rows of 3 tokens: 6 in all
    assert [(c.key_dim, c.value_dim) for c in report.converted] == [(K, V)], str(report)


def test_as_many_rows_and_tokens_as_channels_that_were_cut() -> None:
    """The second layer has them behind the first one's channels, some of which are written to."""
    layers = nn.Sequential(Tokens(), Tokens())
    report = llcompile.inspect(layers, torch.randn(2, V // 2, 8)).report
    assert [(c.module, c.key_dim, c.value_dim) for c in report.converted] == [("0", K, V), ("1", K, V)], str(report)


class Retention(nn.Module):
    """Heads that share a query and a key, with a decay of their own each; token by token."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, K), nn.Linear(8, K), nn.Linear(8, 2 * V)
        self.register_buffer("decay", torch.tensor([0.9, 0.97]))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x).unflatten(-1, (2, V))
        state, outs = x.new_zeros(len(x), 2, K, V), []
        for i in range(x.shape[1]):
            state = self.decay[:, None, None] * state + k[:, i, None, :, None] * v[:, i, :, None]
            outs.append((q[:, i, None, :, None] * state).sum(2))
        return torch.stack(outs, 1)


@pytest.mark.parametrize("tokens", [2, 3])
def test_two_tokens_tell_decays_of_heads_apart(tokens: int) -> None:
    report = llcompile.inspect(Retention(), torch.randn(3, tokens, 8)).report
    assert [(c.heads, c.key_dim, c.value_dim) for c in report.converted] == [(2, K, V)], str(report)


class Gated(nn.Module):
    """A decay of the data, token by token; a decay for each channel of the key, and the delta rule."""

    def __init__(self, channels: int, delta: bool) -> None:
        super().__init__()
        self.delta = delta
        self.q, self.k, self.v = nn.Linear(8, 2 * K), nn.Linear(8, 2 * K), nn.Linear(8, 2 * V)
        self.decay, self.beta = nn.Linear(8, 2 * channels), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, g = (m(x).unflatten(-1, (2, -1)) for m in (self.q, self.k, self.v, self.decay))
        k = nn.functional.normalize(k, dim=-1)
        beta = self.beta(x).sigmoid()[..., None]
        state, outs = x.new_zeros(len(x), 2, K, V), []
        for i in range(x.shape[1]):
            state = state * g[:, i].sigmoid()[..., None]
            new = v[:, i] - torch.einsum("bhk,bhkv->bhv", k[:, i], state) if self.delta else v[:, i]
            state = state + torch.einsum("bhk,bhv->bhkv", k[:, i], beta[:, i] * new)
            outs.append(torch.einsum("bhk,bhkv->bhv", q[:, i], state))
        return torch.stack(outs, 1)


@pytest.mark.parametrize("tokens", [2, 3])
@pytest.mark.parametrize("channels", [1, K], ids=["a decay per head", "a decay per channel"])
@pytest.mark.parametrize("delta", [False, True], ids=["sum", "delta rule"])
def test_decays_of_two_tokens(tokens: int, channels: int, delta: bool) -> None:
    report = llcompile.inspect(Gated(channels, delta), torch.randn(3, tokens, 8)).report
    family = {
        (1, False): "scalar-decay linear attention",
        (K, False): "gated linear attention",
        (1, True): "Gated DeltaNet",
        (K, True): "Kimi Delta Attention",
    }[channels, delta]
    assert [(c.family, c.heads, c.key_dim, c.value_dim) for c in report.converted] == [(family, 2, K, V)], str(report)


class Taken(nn.Module):
    """A token loop; `before` makes its tokens of the input, `behind` makes the output as long as the input again."""

    def __init__(self, before: Callable[[Tensor], Tensor], behind: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.before, self.behind = before, behind
        self.q, self.k, self.v, self.out = nn.Linear(8, K), nn.Linear(8, K), nn.Linear(8, V), nn.Linear(V, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        q, k, v = (f(y).unbind(1) for f in (self.q, self.k, self.v))
        state, outs = x.new_zeros(len(x), K, V), []
        for i in range(len(q)):
            state = state + k[i][:, :, None] * v[i][:, None]
            outs.append((q[i][:, None] @ state).squeeze(1))
        return x + self.behind(self.out(torch.stack(outs, 1)))


def test_a_miss_is_not_remembered_of_another_axis_of_time() -> None:
    """One program, and two readings of which axis is time: in the first, rows and tokens may be taken for one axis."""
    pooled = Taken(lambda x: nn.functional.avg_pool1d(x.mT, 2).mT, lambda y: y.repeat_interleave(2, 1))
    llcompile.inspect(pooled, torch.randn(2, 12, 8))
    report = llcompile.inspect(Taken(lambda x: x, lambda y: y), torch.randn(2, 6, 8)).report
    assert [(c.key_dim, c.value_dim) for c in report.converted] == [(K, V)], str(report)
