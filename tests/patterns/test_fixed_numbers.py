"""Decays and steps that the code holds as numbers: decays of each head, cut up in loops; the rate of a delta rule."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import llcompile
from tests.helpers import small

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

HEADS, KEY, VALUE, WIDTH = 3, 4, 5, 16


class Shared(nn.Module):
    """One query and key for all heads, each of which forgets at a rate of its own."""

    rates: Tensor

    def __init__(self, mix: Callable[[Shared, Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(WIDTH, KEY), nn.Linear(WIDTH, KEY), nn.Linear(WIDTH, HEADS * VALUE)
        self.out, self.mix = nn.Linear(HEADS * VALUE, WIDTH), mix
        self.register_buffer("rates", torch.tensor([0.8, 0.9, 0.95]))

    def forward(self, x: Tensor) -> Tensor:
        v = self.v(x).unflatten(-1, (HEADS, VALUE))
        return x + self.out(self.mix(self, self.q(x), self.k(x), v).flatten(2))


def powers(m: Shared, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(q.shape[1])
    kept = torch.where(i[:, None] < i, 0.0, m.rates[:, None, None] ** (i[:, None] - i))  # [H, T, T]
    return torch.einsum("bts,hts,bshv->bthv", q @ k.mT, kept, v)


def sums_of_logarithms(m: Shared, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    passed = m.rates.log().expand(q.shape[1], HEADS).cumsum(0)  # [T, H]
    kept = (passed[:, None] - passed[None]).exp().permute(2, 0, 1).tril()
    return ((q @ k.mT)[:, None] * kept @ v.transpose(1, 2)).transpose(1, 2)


def a_table_of_steps(m: Shared, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    table = m.rates.expand(q.shape[1], HEADS)
    state, outs = empty(q), []
    for i in range(q.shape[1]):
        state = table[i][:, None, None] * state + k[:, i, None, :, None] * v[:, i, :, None]
        outs.append((q[:, i, None, None] @ state).squeeze(2))
    return torch.stack(outs, 1)


def a_table_in_chunks(m: Shared, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    table = m.rates.log().repeat(q.shape[1], 1)
    state, outs = empty(q), []
    for qc, kc, vc, g in zip(q.split(4, 1), k.split(4, 1), v.split(4, 1), table.split(4), strict=True):
        c = g.cumsum(0)  # [C, H]
        scores = (qc @ kc.mT)[:, None] * (c.T[:, :, None] - c.T[:, None]).exp().tril()
        inside = torch.einsum("bhts,bshv->bthv", scores, vc)
        outs.append(inside + torch.einsum("btk,th,bhkv->bthv", qc, c.exp(), state))
        left = (c[-1] - c).exp()
        state = c[-1].exp()[:, None, None] * state + torch.einsum("btk,th,bthv->bhkv", kc, left, vc)
    return torch.cat(outs, 1)


def empty(q: Tensor) -> Tensor:
    return q.new_zeros(q.shape[0], HEADS, KEY, VALUE)


def by_position(m: Shared, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """No two steps keep as much: a decay for each step and head."""
    table = m.rates ** (1 + torch.arange(q.shape[1]) % 3)[:, None]
    state, outs = empty(q), []
    for i in range(q.shape[1]):
        state = table[i][:, None, None] * state + k[:, i, None, :, None] * v[:, i, :, None]
        outs.append((q[:, i, None, None] @ state).squeeze(2))
    return torch.stack(outs, 1)


@pytest.mark.parametrize("mix", [powers, sums_of_logarithms, a_table_of_steps, a_table_in_chunks, by_position])
def test_each_head_has_its_own(mix: Callable[..., Tensor]) -> None:
    model, x = Shared(mix), torch.randn(2, 10, WIDTH)
    want = model(x).detach()
    report = llcompile.convert(model, x, verify=False)
    assert [(c.decay, c.heads) for c in report.converted] == [("scalar", HEADS)], report
    run = torch.compile(model, backend="loglinear", options={"inner": "eager"})
    assert small.difference(run(x), want) < 1e-5
    model.rates.mul_(0.7)  # read at each call, not baked in
    want = model(x).detach()
    assert small.difference(run(x), want) < 1e-5
    small.perturb(model)
    assert small.difference(run(x), want) > 1e-3


class FastWeights(nn.Module):
    """Delta rule whose rate is a number of the code; `kept` of what was stored is taken off."""

    rate: Tensor

    def __init__(self, kept: float) -> None:
        super().__init__()
        self.all, self.kept = nn.Linear(WIDTH, 3 * WIDTH), kept
        self.register_buffer("rate", torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.all(x).chunk(3, -1)
        k = F.normalize(k, dim=-1)
        fast, outs = x.new_zeros(x.shape[0], WIDTH, WIDTH), []
        for i in range(x.shape[1]):
            missing = v[:, i] - self.kept * (k[:, i, None] @ fast).squeeze(1)
            fast = fast + self.rate * k[:, i, :, None] * missing[:, None]
            outs.append((q[:, i, None] @ fast).squeeze(1))
        return x + torch.stack(outs, 1)


@pytest.mark.parametrize("kept", [1.0, 0.5])  # half of it: a step half as large of twice the value
def test_a_step_that_is_a_number(kept: float) -> None:
    model, x = FastWeights(kept), torch.randn(2, 7, WIDTH)
    want = model(x).detach()
    report = llcompile.convert(model, x, verify=False)
    assert [c.correction for c in report.converted] == ["delta"], report
    assert any(f"{0.3 * kept:.2g}" in note for note in report.converted[0].notes)
    run = torch.compile(model, backend="loglinear", options={"inner": "eager"})
    assert small.difference(run(x), want) < 1e-5
    model.rate.fill_(0.8)
    assert small.difference(want, model(x)) > 1e-2
    assert small.difference(run(x), model(x)) < 1e-5
    before = run(x).detach()
    small.perturb(model)
    assert small.difference(run(x), before) > 1e-3


def test_what_adds_to_the_state_instead_is_no_delta_rule() -> None:
    """It is a mixer with an erase key, along which the state grows."""
    model, x = FastWeights(-0.5), torch.randn(2, 7, WIDTH)
    report = llcompile.convert(model, x, verify=False)
    run = torch.compile(model, backend="loglinear", options={"inner": "eager"})
    assert small.difference(run(x), model(x)) < 1e-5
    assert [c.family for c in report.converted] == ["DeltaNet with an erase key"]


@pytest.mark.parametrize("rates", [[0.8, 0.9, 0.95], [0.8, 0.85, 0.9]], ids=["any", "evenly spaced"])
def test_numbers_of_heads_serve_all_lengths(rates: list[float]) -> None:
    """Numbers of heads that happen to lie on a line are no positions: one graph serves all lengths."""
    model = Shared(powers)
    model.rates = torch.tensor(rates)
    llcompile.convert(model, torch.randn(2, 24, WIDTH))
    run = torch.compile(model, backend="loglinear", dynamic=True, options={"inner": "eager"})
    torch._dynamo.utils.counters.clear()
    for length in (24, 40, 90):
        x = torch.randn(2, length, WIDTH)
        assert small.difference(run(x), model(x)) < 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
