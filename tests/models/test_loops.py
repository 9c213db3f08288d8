"""Loops over chunks and tokens: however they take, put back and compute what they need, it is the same mixer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.small import difference
from tests.models.written import WIDTH, Function, Written, agreeing, compiled, example, mix, moves, same

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


@pytest.mark.parametrize("length", [8, WIDTH])
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


def normalised(decays: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Function:
    """Linear attention, normalised; `decays` of a gate [B, 1] gives the state's [B, 1, 1] and the normaliser's."""

    def function(layer: Written, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = q.exp(), k.exp()
        state, total, outs = x.new_zeros(len(x), WIDTH, WIDTH), x.new_zeros(len(x), WIDTH), []
        for i in range(x.shape[1]):
            one, two = decays(layer.gate(x[:, i]))
            state = state * one + k[:, i, :, None] * v[:, i, None]
            total = total * two + k[:, i]
            outs.append((q[:, i, :, None] * state).sum(1) / (q[:, i] * total).sum(-1, keepdim=True))
        return torch.stack(outs, dim=1)

    return function


def _changed_afterwards(g: Tensor) -> tuple[Tensor, Tensor]:
    first = torch.sigmoid(g) / 2
    kept = first * 1.0
    first.mul_(0.5)
    return torch.sigmoid(g[..., None]) / 2, kept


TWICE: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "logsigmoid": lambda g: (F.logsigmoid(g.unsqueeze(-1)).exp(), F.logsigmoid(g).exp()),
    "softplus": lambda g: (torch.exp(-F.softplus(g)).unflatten(-1, (1, 1)), torch.exp(-F.softplus(g))),
    "transposed": lambda g: (torch.sigmoid(g[..., None].mT), torch.sigmoid(g)),
    "a square": lambda g: (1 - torch.sigmoid(g).square()[..., None], 1 - torch.sigmoid(g).square()),
    "changed afterwards": _changed_afterwards,
}
APART: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "twice as fast": lambda g: (torch.exp(-F.softplus(g))[..., None], torch.exp(-2 * F.softplus(g))),
    "detached": lambda g: (torch.sigmoid(g[..., None]), torch.sigmoid(g.detach())),
    "half of it": lambda g: (torch.sigmoid(g)[..., None] / 2, (torch.sigmoid(g) / 2).mul_(0.5)),
}


@pytest.mark.parametrize("name", TWICE)
def test_one_decay_computed_twice(name: str) -> None:
    report, model = same(normalised(TWICE[name]), length=9)
    assert [c.family for c in report.converted] == ["scalar-decay linear attention"], str(report)
    assert moves(model, length=9) > 1e-3


@pytest.mark.parametrize("name", APART)
def test_two_decays(name: str) -> None:
    """The control: what is not the same number is not taken for it."""
    report, _ = same(normalised(APART[name]), length=9)
    assert not report.converted
    assert report.declined


class Tables(Written):
    """A layer that has a row of numbers for each position: a buffer, longer than the sequences, and a parameter."""

    def __init__(self, function: Function) -> None:
        super().__init__(function)
        angles = torch.arange(40.0)[:, None] / 3.0 ** torch.arange(WIDTH // 2)
        self.register_buffer("cos", angles.cos().repeat(1, 2))
        self.register_buffer("sin", angles.sin().repeat(1, 2))
        self.learned = torch.nn.Parameter(torch.randn(9, WIDTH))


def _half_turned(x: Tensor) -> Tensor:
    return torch.cat([-x[..., WIDTH // 2 :], x[..., : WIDTH // 2]], dim=-1)


Step = Callable[[Tables, int, Tensor], Tensor]
STEPS: dict[str, tuple[Step, Step]] = {  # of keys, and of outputs
    "angles": (lambda m, i, x: x * math.cos(i / 3) + _half_turned(x) * math.sin(i / 3), lambda m, i, x: x),
    "a table of angles": (lambda m, i, x: x * m.cos[i] + _half_turned(x) * m.sin[i], lambda m, i, x: x),
    "learned positions": (lambda m, i, x: x + m.learned[i], lambda m, i, x: x),
    "a mean": (lambda m, i, x: x, lambda m, i, x: x / (i + 1)),
    "a table for outputs": (lambda m, i, x: x * 2.0, lambda m, i, x: x * m.cos[i] + m.learned[i]),
    "two factors": (lambda m, i, x: (x * (i + 1)).exp() + (x * (0.5 - i)).tanh(), lambda m, i, x: x),
    "ones made anew": (lambda m, i, x: (x + torch.ones(WIDTH)).tanh(), lambda m, i, x: torch.zeros(1) - x),
    "a table with numbers": (lambda m, i, x: (x + m.learned[i] * (i + 1)).tanh(), lambda m, i, x: x * (m.cos[i] - i)),
    "nothing of the first": (lambda m, i, x: x * i, lambda m, i, x: x),
}


def by_token(key: Step, output: Step) -> Function:
    """Linear attention token by token, with something done to each key and each output."""

    def function(layer: Tables, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        state, outs = x.new_zeros(len(x), WIDTH, WIDTH), []
        for i in range(x.shape[1]):
            state = state + key(layer, i, k[:, i]).unsqueeze(-1) * v[:, i, None]
            outs.append(output(layer, i, (q[:, i, None] @ state).squeeze(1)))
        return torch.stack(outs, dim=1)

    return function


@pytest.mark.parametrize("name", STEPS)
def test_numbers_of_each_position(name: str) -> None:
    model = Tables(by_token(*STEPS[name]))
    report = agreeing(model, length=9)
    assert [c.family for c in report.converted] == ["linear attention"], str(report)
    assert moves(model, length=9) > 1e-3


def test_a_table_that_changes_is_read_anew() -> None:
    model = Tables(by_token(*STEPS["a table of angles"]))
    agreeing(model, length=9)
    run, control = compiled(model), example(9)
    with torch.no_grad():
        before = run(control)
        model.cos.mul_(0.5)
        want = model.function(model, control, model.query(control), model.key(control), model.value(control))
        assert difference(run(control), want) < 1e-5
    assert difference(before, want) > 1e-2


def _scaled_by_rows(m: Tables, i: int, x: Tensor) -> Tensor:
    return (x * len(x) ** -0.5).tanh()


@pytest.mark.parametrize("place", [0, 1], ids=["keys", "outputs"])
def test_a_number_that_follows_from_the_batch(place: int) -> None:
    """It is another one in the graph that Dynamo makes for all batches."""
    steps = [STEPS["a mean"][0]] * 2
    steps[place] = _scaled_by_rows
    model = Tables(by_token(steps[0], steps[1]))
    assert agreeing(model, length=9).converted
    run = compiled(model)
    for rows in (2, 3, 5):
        x = torch.randn(rows, 9, WIDTH)
        want = model.function(model, x, model.query(x), model.key(x), model.value(x))
        assert difference(run(x), want) < 1e-5


class Rated(torch.nn.Module):
    """Whole chunks with a learned rate for each of two heads, which may have any sign for all that is known."""

    def __init__(self, late: float = 1.0) -> None:
        super().__init__()
        self.qkv, self.late = torch.nn.Linear(WIDTH, 3 * WIDTH), late
        self.rate = torch.nn.Parameter(torch.tensor([0.05, 0.1])[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        size = 2 * CHUNK
        q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        at = torch.arange(size, device=x.device, dtype=x.dtype)[:, None]
        inner = (-self.rate * (at - at.T)).exp().tril()
        state, outs = torch.zeros(WIDTH // 2, WIDTH // 2, device=x.device), []
        for a, b, c in zip(q.split(size, 2), k.split(size, 2), v.split(size, 2), strict=True):
            outs.append(
                (a @ b.mT * inner) @ c + (a * (-self.rate * (at + 1)).exp()) @ (state + torch.zeros_like(b.mT @ c))
            )
            state = (-self.rate * size).exp() * state + (b * (-self.rate * self.late * (size - 1 - at)).exp()).mT @ c
        return torch.cat(outs, dim=2).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("length", [32, 64])
def test_a_learned_rate_in_a_loop_of_whole_chunks(length: int) -> None:
    model = Rated()
    report = agreeing(model, length=length)
    assert [c.family for c in report.converted] == ["scalar-decay linear attention"], str(report)
    assert moves(model, length=length) > 1e-3


def test_two_rates() -> None:
    """The control: what is handed on to the next chunk fades at another rate."""
    report = agreeing(Rated(late=0.5), length=32)
    assert not report.converted
    assert report.declined


Features = Callable[[Tensor, Tensor, Tensor], Tensor]


def _unbound(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = torch.zeros_like(v)
    for a, b in zip(q.unbind(-1), k.exp().unbind(-1), strict=True):
        out = out + a[..., None] * torch.cumsum(b[..., None] * v, dim=1)
    return out


def _heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.unflatten(-1, (2, -1)) for x in (q, k, v))
    pairs = (q[..., i : i + 1] * (k.narrow(-1, i, 1) * v).cumsum(1) for i in range(q.shape[-1]))
    return torch.stack(list(pairs)).sum(0).flatten(-2)


def _scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = sum(q[..., i, None] * k[..., None, :, i] for i in range(WIDTH))
    return torch.as_tensor(scores).tril() @ v


def _shifted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each feature of a query reads another one of the keys, some more than one."""
    return sum((q[..., i, None] * (k[..., i // 2, None] * v).cumsum(1) for i in range(WIDTH)), start=torch.zeros(()))


def _ahead(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sum((q[..., i, None] * (k[..., i, None] * v).flip(1).cumsum(1) for i in range(WIDTH)), torch.zeros(()))


@pytest.mark.parametrize("features", [_unbound, _heads, _scores], ids=lambda f: f.__name__[1:])
def test_loop_over_the_features_of_a_key(features: Features) -> None:
    report, model = same(lambda layer, x, q, k, v: features(q, k, v))
    assert [c.family for c in report.converted] == ["linear attention"], str(report)
    assert moves(model) > 1e-3


@pytest.mark.parametrize("features", [_shifted, _ahead], ids=lambda f: f.__name__[1:])
def test_loop_over_features_that_is_none(features: Features) -> None:
    """The control: features that do not meet one by one, and a sum from the end."""
    report, _ = same(lambda layer, x, q, k, v: features(q, k, v))
    assert not report.converted
