"""In-place statements on and around a mixer happen to the log-linear output, in their order; outputs and gradients are
those of the unconverted program."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.models.written import WIDTH, Written, mix, moves, same

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore::llcompile.errors.LLCompileWarning"),
]


def plain(m: Written, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return m.out(mix(q, k, v))


def foreach(m: Written, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    o = mix(q, k, v)
    torch._foreach_mul_([o], 2.0)
    return m.out(o)


def chained_views(m: Written, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    o = mix(q, k, v)
    o.transpose(1, 2)[:, :8].unflatten(1, (2, 4)).add_(1.0)
    return m.out(o)


def index_copy(m: Written, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    o = mix(q, k, v)
    o.index_copy_(1, torch.tensor([0, 3]), o.new_zeros(2, 2, WIDTH))
    return o


def slice_of_a_buffer(m: Written, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    whole = x.new_zeros(*x.shape[:2], 2 * WIDTH)
    whole[..., :WIDTH].copy_(mix(q, k, v))
    middle = whole[..., 4:16]
    middle *= 2
    return whole


def base_later(m: Written, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    o = mix(q, k, v)
    half = o[..., :6]
    F.hardtanh_(o, -0.5, 0.5)
    return half


def through_data(m: Written, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    o = mix(q, k, v)
    o.data.mul_(3.0)
    return m.out(o)


def into_a_sum(m: Written, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    y = m.out(x)
    y += mix(q, k, v)
    y -= x
    return y


def scores_in_place(m: Written, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores *= 0.5
    scores.masked_fill_(torch.ones(x.shape[1], x.shape[1]).triu(1).bool(), 0.0)
    return scores @ v


def loop_into_a_buffer(m: Written, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, out = x.new_zeros(len(x), WIDTH, WIDTH), torch.empty_like(v)
    for t in range(x.shape[1]):
        state = state + k[:, t, :, None] * v[:, t, None]
        out[:, t] = (q[:, t, None] @ state)[:, 0]
    out *= 2
    return out.relu_()


CONVERTED = [
    plain,
    foreach,
    chained_views,
    index_copy,
    slice_of_a_buffer,
    base_later,
    through_data,
    into_a_sum,
    scores_in_place,
    loop_into_a_buffer,
]


@pytest.mark.parametrize("function", CONVERTED)
def test_statements_around_a_mixer(function: object) -> None:
    """Nothing else changes, and what is read after the statement is log-linear."""
    report, model = same(function)  # type: ignore[arg-type]
    assert len(report.converted) == 1
    assert moves(model) > 1e-3


def computed_twice(m: Written, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    first, second = mix(q, k, v), mix(q, k, v)
    second.mul_(2.0)
    return first + second


def older_view(m: Written, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = torch.zeros_like(v)
    half = out[..., :6]
    out.add_(mix(q, k, v).clone())
    out.mul_(2.0)
    return torch.cat([half, out], -1)


def query_becomes_output(m: Written, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    result = mix(q, k, v)
    q.copy_(result)
    return q


def key_cleared(m: Written, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.tril(q @ k.mT)
    k.zero_()
    return scores @ v + k


def value_through_its_base(m: Written, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    both = torch.cat([k, v], -1)
    k, v = both.chunk(2, -1)
    o = mix(q, k, v)
    both.fill_(1.0)
    return o + v


@pytest.mark.parametrize(
    "function", [computed_twice, older_view, query_becomes_output, key_cleared, value_through_its_base]
)
def test_statements_on_what_a_mixer_shares(function: object) -> None:
    """Converted or declined, the output is the program's. (The code itself has no backward: its operands are gone.)"""
    same(function, grads=False)  # type: ignore[arg-type]


def test_declined_with_the_line_of_the_statement() -> None:
    report, _ = same(computed_twice)
    assert not report.converted
    assert "in computed_twice" in report.declined[0].reason


class Recorded(Written):
    """Writes its output into a buffer that is there before and after the call."""

    def __init__(self) -> None:
        super().__init__(plain)
        self.register_buffer("last", torch.zeros(2, 19, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            torch.bmm(torch.tril(self.query(x) @ self.key(x).mT), self.value(x), out=self.last)
        return self.last * 1


def test_an_output_that_outlives_the_call() -> None:
    """The buffer holds what it held unconverted."""
    from tests.models.written import compiled, example

    model, x = Recorded(), example()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = model(x).clone()
        import llcompile

        llcompile.convert(model, x)
        model.last.zero_()
        assert torch.allclose(compiled(model)(x), want, atol=1e-5)
        assert torch.allclose(model.last, want, atol=1e-5)
