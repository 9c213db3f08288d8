"""Recurrences by their usual name: as loops over tokens, as scans, as trees; and loops that are none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops.associative_scan import associative_scan
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop

from tests.patterns.identified import UNNAMED, kinds, watched

B, T, D, N = 2, 9, 16, 4
MAMBA, RG_LRU, RNN = "selective scan (Mamba-1)", "gated linear recurrence (RG-LRU)", "non-linear recurrence (RNN)"


class Selective(nn.Module):
    """Mamba-1 around a scan: (decay [B, T, D, N], input [B, T, D, N]) -> states."""

    def __init__(self, scan_of: Callable[[Tensor, Tensor], Tensor], fixed: bool = False, conv: bool = False) -> None:
        super().__init__()
        self.scan_of, self.fixed = scan_of, fixed
        self.step, self.bc, self.out = nn.Linear(D, D), nn.Linear(D, 2 * N), nn.Linear(D, D)
        self.rate, self.skip = nn.Parameter(torch.rand(D, N)), nn.Parameter(torch.ones(D))
        self.conv = nn.Conv1d(D, D, 4, padding=3, groups=D) if conv else None

    def forward(self, x: Tensor) -> Tensor:
        if self.conv is not None:
            x = F.silu(self.conv(x.mT)[..., : x.shape[1]]).mT
        dt = F.softplus(self.step(x))
        b, c = self.bc(x).chunk(2, -1)
        rate = -self.rate.exp()
        decay = torch.exp(dt[..., None] * rate)
        states = self.scan_of(
            rate.exp().expand_as(decay) if self.fixed else decay, dt[..., None] * b[:, :, None] * x[..., None]
        )
        return self.out(torch.einsum("btdn,btn->btd", states, c) + self.skip * x)


def loop(a: Tensor, u: Tensor) -> Tensor:
    h, states = torch.zeros_like(u[:, 0]), []
    for t in range(u.shape[1]):
        h = a[:, t] * h + u[:, t]
        states.append(h)
    return torch.stack(states, 1)


def unbound(a: Tensor, u: Tensor) -> Tensor:
    h, states = 0, torch.empty_like(u)
    for t, (decay, given) in enumerate(zip(a.unbind(1), u.unbind(1), strict=True)):
        h = torch.addcmul(given, decay, h) if t else given
        states[:, t] = h
    return states


def in_place(a: Tensor, u: Tensor) -> Tensor:
    h, states = torch.zeros_like(u[:, 0]), []
    for t in range(u.shape[1]):
        h.mul_(a[:, t]).add_(u[:, t])
        states.append(h.clone())
    return torch.stack(states, 1)


def backwards(a: Tensor, u: Tensor) -> Tensor:
    h, states = torch.zeros_like(u[:, 0]), []
    for t in reversed(range(u.shape[1])):
        h = h * a.select(1, t) + u.select(1, t)
        states.insert(0, h)
    return torch.stack(states, 1)


def doubling(a: Tensor, u: Tensor) -> Tensor:
    """Hillis and Steele's parallel scan."""
    shift, rest = 1, (0,) * (2 * (u.dim() - 2))
    while shift < u.shape[1]:
        before_a, before_u = (F.pad(t[:, :-shift], (*rest, shift, 0)) for t in (a, u))
        u = u + a * before_u
        a = a * before_a
        shift *= 2
    return u


def doubling_without_padding(a: Tensor, u: Tensor) -> Tensor:
    """What is combined with what came before is cut out anew for each of the two products."""
    shift = 1
    while shift < u.shape[1]:
        first, later = u.narrow(1, 0, shift), u[:, shift:] + u[:, :-shift] * a[:, shift:]
        u = torch.cat([first, later], dim=1)
        a = torch.cat([a[:, :shift], a[:, shift:] * a[:, :-shift]], dim=1)
        shift *= 2
    return u


def _pairs(left: Any, right: Any) -> Any:
    return left[0] * right[0], right[0] * left[1] + right[1]


def associative(a: Tensor, u: Tensor) -> Tensor:
    return associative_scan(_pairs, (a, u), dim=1, combine_mode="generic")[1]


def sequential(a: Tensor, u: Tensor) -> Tensor:
    def step(h: Tensor, now: Any) -> Any:
        h = now[0] * h + now[1]
        return h, h.clone()

    return scan(step, torch.zeros_like(u[:, 0]), (a, u), dim=1)[1]


def accumulated(a: Tensor, u: Tensor) -> Tensor:
    """The decays' logarithms added up, and undone before the sum."""
    c = a.log().cumsum(1)
    return c.exp() * (u * (-c).exp()).cumsum(1)


SCANS = (accumulated, loop, unbound, in_place, backwards, doubling, doubling_without_padding, associative, sequential)


@pytest.mark.parametrize("scan_of", SCANS)
def test_selective_scan(scan_of: Callable[..., Tensor]) -> None:
    (record,) = watched(Selective(scan_of), torch.randn(B, T, D)).records
    assert record.kind == MAMBA
    assert "test_identify_recurrences.py:" in record.where


def test_its_convolution_is_a_part_of_it() -> None:
    for scan_of in (loop, associative):
        assert kinds(Selective(scan_of, conv=True), torch.randn(B, T, D)) == [MAMBA]


class SelectiveStep(Selective):
    """Everything inside the loop, the output too."""

    def forward(self, x: Tensor) -> Tensor:
        h, out, rate = torch.zeros(x.shape[0], D, N), [], -self.rate.exp()
        for t in range(x.shape[1]):
            now = x[:, t]
            dt = F.softplus(self.step(now))
            b, c = self.bc(now).chunk(2, -1)
            h = torch.exp(dt[..., None] * rate) * h + (dt * now)[..., None] * b[:, None]
            out.append((h * c[:, None]).sum(-1) + self.skip * now)
        return self.out(torch.stack(out, 1))


def test_selective_scan_step_by_step() -> None:
    assert kinds(SelectiveStep(loop), torch.randn(B, T, D)) == [MAMBA]


class Gated(nn.Module):
    """RG-LRU around a scan; `fixed` takes the decay from a parameter alone."""

    def __init__(self, scan_of: Callable[[Tensor, Tensor], Tensor], fixed: bool = False) -> None:
        super().__init__()
        self.scan_of, self.fixed = scan_of, fixed
        self.gates, self.rate, self.out = nn.Linear(D, 2 * D), nn.Parameter(torch.rand(D)), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        r, i = self.gates(x).sigmoid().chunk(2, -1)
        a = torch.exp(-8.0 * F.softplus(self.rate) * r)
        a = F.softplus(self.rate).neg().exp().expand(x.shape) if self.fixed else a
        return self.out(F.gelu(x) * self.scan_of(a, (1 - a * a).sqrt() * i * x))


@pytest.mark.parametrize("scan_of", SCANS)
def test_gated_linear_recurrence(scan_of: Callable[..., Tensor]) -> None:
    assert kinds(Gated(scan_of), torch.randn(B, T, D)) == [RG_LRU]


def blended(a: Tensor, u: Tensor) -> Tensor:
    h, states = torch.zeros_like(u[:, 0]), []
    for t in range(u.shape[1]):
        h = torch.lerp(u[:, t], h, a[:, t])
        states.append(h)
    return torch.stack(states, 1)


def in_logarithms(a: Tensor, u: Tensor) -> Tensor:
    """minGRU's parallel form."""
    c = a.log().cumsum(1)
    return torch.exp(c + torch.logcumsumexp(F.softplus(u).log() - c, dim=1))


def step_towards(a: Tensor, u: Tensor) -> Tensor:
    h, states = torch.zeros_like(u[:, 0]), []
    for t in range(u.shape[1]):
        h = h + a[:, t] * (u[:, t] - h)
        states.append(h)
    return torch.stack(states, 1)


def test_other_spellings_of_a_gate() -> None:
    for scan_of in (in_logarithms, step_towards):
        assert kinds(Gated(scan_of), torch.randn(B, T, D)) == [RG_LRU]
    assert kinds(Gated(blended), torch.randn(B, T, D)) == [RG_LRU]


def test_a_fixed_decay() -> None:
    assert kinds(Gated(loop, fixed=True), torch.randn(B, T, D)) == ["linear recurrence with a fixed decay"]
    assert kinds(Selective(loop, fixed=True), torch.randn(B, T, D)) == ["state space scan (S4)"]


# -- non-linear


class Elman(nn.Module):
    """h = tanh(W x + U h), or without tanh."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.act, self.x, self.h = act, nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        h, out = x.new_zeros(x.shape[0], D), []
        for t in range(x.shape[1]):
            h = self.act(self.x(x[:, t]) + self.h(h))
            out.append(h)
        return torch.stack(out, 1)


class Cells(nn.Module):
    """torch's cells, one token after the other."""

    def __init__(self, cell: type[nn.Module]) -> None:
        super().__init__()
        self.cell = cell(D, D)

    def forward(self, x: Tensor) -> Tensor:
        state, out = None, []
        for now in x.unbind(1):
            state = self.cell(now, state)
            out.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(out, 1)


class HandLSTM(nn.Module):
    """Four gates, one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.x, self.h = nn.Linear(D, 4 * D), nn.Linear(D, 4 * D)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.shape[0], D)
        out = []
        for t in range(x.shape[1]):
            i, f, g, o = (self.x(x[:, t]) + self.h(h)).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            out.append(h)
        return torch.stack(out, 1)


def curved(a: Tensor, u: Tensor) -> Tensor:
    """One step away from RG-LRU: the state goes through tanh."""
    h, states = torch.zeros_like(u[:, 0]), []
    for t in range(u.shape[1]):
        h = torch.tanh(a[:, t] * h + u[:, t])
        states.append(h)
    return torch.stack(states, 1)


NONLINEAR: list[nn.Module] = [
    Elman(torch.tanh),
    Elman(torch.relu),
    HandLSTM(),
    Gated(curved),
    *(Cells(cell) for cell in (nn.LSTMCell, nn.GRUCell, nn.RNNCell)),
]


@pytest.mark.parametrize("model", NONLINEAR)
def test_nonlinear_recurrence(model: nn.Module) -> None:
    assert kinds(model, torch.randn(B, T, D)) == [RNN]


def test_dense_transition() -> None:
    assert kinds(Elman(lambda h: h), torch.randn(B, T, D)) == ["linear recurrence with a dense transition"]


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_layers_of_torch_in_the_graph(layer: Callable[..., nn.Module]) -> None:
    with torch._dynamo.config.patch(allow_rnn=True):
        assert kinds(layer(D, D, batch_first=True), torch.randn(B, T, D)) == [RNN]


# -- what torch keeps as one call


class Until(nn.Module):
    """Linear attention token by token, to the end or, if `early`, until the state is large enough."""

    def __init__(self, early: bool) -> None:
        super().__init__()
        self.early, (self.q, self.k, self.v) = early, (nn.Linear(D, D) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        length = x.shape[1]

        def more(i: Tensor, state: Tensor, out: Tensor) -> Tensor:
            return (i < length) & (state.abs().sum() < 50.0) if self.early else i < length

        def step(i: Tensor, state: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            q_i, k_i, v_i = (y.index_select(1, i.reshape(1)) for y in (q, k, v))
            state = state + k_i.mT @ v_i
            return i + 1, state, out.index_copy(1, i.reshape(1), q_i @ state)

        start = torch.zeros((), dtype=torch.int64), x.new_zeros(len(x), D, D), torch.zeros_like(v)
        return while_loop(more, step, start)[2]


def test_a_loop_that_data_end() -> None:
    """How many steps it has is not known, so that it has no other name; the same loop to the end is written out."""
    (record,) = watched(Until(early=True), torch.randn(B, T, D)).records
    assert record.kind == "loop whose number of steps is not known (while_loop)"
    assert "test_identify_recurrences.py:" in record.where
    assert kinds(Until(early=False), torch.randn(B, T, D)) == [UNNAMED]


# -- nothing to name


class Matrix(nn.Module):
    """Linear attention and its like: a state [K, V], with a decay for each head, each key, or none; the delta rule; a
    denominator, which has the keys' decays."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.qkv, self.gate, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        g = self.gate(x).sigmoid()
        state, total, out = x.new_zeros(x.shape[0], D, D), x.new_zeros(x.shape[0], D), []
        for t in range(x.shape[1]):
            if self.kind == "head":
                state = state * g[:, t, :1, None]
            if self.kind == "key":
                state = state * g[:, t, :, None]
            new = v[:, t]
            if self.kind == "delta":
                new = new - torch.einsum("bk,bkv->bv", k[:, t], state)
            state = state + k[:, t, :, None] * new[:, None]
            read = torch.einsum("bk,bkv->bv", q[:, t], state)
            if self.kind == "normalised":
                total = g[:, t] * total + k[:, t]
                read = read / (q[:, t] * total).sum(-1, keepdim=True)
            out.append(read)
        return self.out(torch.stack(out, 1))


def in_chunks(a: Tensor, u: Tensor) -> Tensor:
    """A state for each chunk that is read by a product of the shapes that chunks have."""
    state, out = torch.zeros(u.shape[0], D, D), []
    for t in range(0, u.shape[1], 3):
        out.append(u[:, t : t + 3] @ state)
        state = a[:, t + 2, :1, None] * state + u[:, t : t + 3].mT @ u[:, t : t + 3]
    return torch.cat(out, 1)


class SharedLayers(nn.Module):
    """One layer again and again: a loop over depth."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        states = []
        for _ in range(6):
            x = x + self.down(torch.tanh(self.up(x)))
            states.append(x)
        return torch.stack(states).mean(0)


class Mixture(nn.Module):
    """A sum over experts, each with its column of the router's weights."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, 5)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, D)) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        weights, out = self.router(x).softmax(-1), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            out = out + weights[..., i : i + 1] * expert(x)
        return out


class Balanced(nn.Module):
    """Sinkhorn's iteration."""

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.exp(x[..., :8].unflatten(-1, (2, 4)))
        for _ in range(6):
            weights = weights / weights.sum(-1, keepdim=True)
            weights = weights / weights.sum(-2, keepdim=True)
        return weights


def running_sum(a: Tensor, u: Tensor) -> Tensor:
    h, states = torch.zeros_like(u[:, 0]), []
    for t in range(u.shape[1]):
        h = h + u[:, t]
        states.append(h / (t + 1))
    return torch.stack(states, 1)


NOTHING: list[nn.Module] = [
    *(Matrix(kind) for kind in ("none", "head", "key", "delta", "normalised")),
    SharedLayers(),
    Mixture(),
    Balanced(),
    Gated(running_sum),
]


def test_a_recurrence_in_chunks() -> None:
    """Its factors are written out, and nothing looks for mixers here."""
    assert kinds(Gated(in_chunks), torch.randn(B, T, D)) == [UNNAMED]


@pytest.mark.parametrize("model", NOTHING)
def test_what_is_none_of_these(model: nn.Module) -> None:
    assert kinds(model, torch.randn(B, T, D)) == []


@pytest.mark.parametrize(
    ("model", "kind", "length"),
    [(Selective(loop), MAMBA, 256), (Gated(loop), RG_LRU, 256), (HandLSTM(), RNN, 100)],
)
def test_long_loops_are_read_once(model: nn.Module, kind: str, length: int) -> None:
    """More than a thousand nodes: by far most of the time is tracing."""
    watch = watched(model, torch.randn(1, length, D))
    assert [record.kind for record in watch.records] == [kind]
    assert watch.nodes > 1000
    assert watch.seconds < 1e-3 * watch.nodes
