"""What stops or changes a gradient inside of a mixer, or its dtype, is part of the program: gradients stay those of the
unconverted code, and a mixer that cannot be had with them is declined with the line."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.models.written import WIDTH, Written, example, mix, moves, same

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore::llcompile.errors.LLCompileWarning"),
]


class Reversed(torch.autograd.Function):
    """Passes values on, and the gradient with its sign turned."""

    @staticmethod
    def forward(ctx: object, a: Tensor) -> Tensor:
        return a.view_as(a)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:  # type: ignore[override]
        return -grad


class StraightThrough(torch.autograd.Function):
    """Rounds, with the gradient of the identity."""

    @staticmethod
    def forward(ctx: object, a: Tensor) -> Tensor:
        return torch.round(a * 4) / 4

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


def _above_query(m: Written, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return mix(Reversed.apply(q), k, v)


def _above_value(m: Written, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return mix(q, k, StraightThrough.apply(v))


def _behind(m: Written, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return m.out(Reversed.apply(mix(q, k, v)))


def _half_stopped(m: Written, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a, b = v.split(WIDTH // 2, -1)
    return mix(q, k, torch.cat([a.detach(), b], -1))


def _through_data(m: Written, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return mix(q, k.data, v)


def _normalised_apart(m: Written, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        length = k.norm(dim=-1, keepdim=True)
    return mix(q, k / length, v)


def _mask_apart(m: Written, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        mask = torch.ones(x.shape[1], x.shape[1]).tril()
    return ((q @ k.mT) * mask) @ v


def _scaled_behind(m: Written, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    o = mix(q, k, v)
    return m.out(0.25 * o + (0.75 * o).detach())


def _output_detached_too(m: Written, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    o = mix(q, k, v)
    return o - m.out(o.detach())


@pytest.mark.parametrize(
    "function",
    [
        _above_query,
        _above_value,
        _behind,
        _half_stopped,
        _through_data,
        _normalised_apart,
        _mask_apart,
        _scaled_behind,
        _output_detached_too,
    ],
)
def test_around_a_mixer(function: object) -> None:
    """Above its operands and behind it, they stay where they are; the mixer is converted."""
    report, model = same(function)  # type: ignore[arg-type]
    assert len(report.converted) == 1
    assert moves(model) > 1e-3


def _scores_scaled(m: Written, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.tril(q @ k.mT)
    return (scores * 0.1 + (scores * 0.9).detach()) @ v


def _scores_reversed(m: Written, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return Reversed.apply(torch.tril(q @ k.mT)) @ v


def _states_stopped(m: Written, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    states = (k[..., None] * v[..., None, :]).cumsum(1).detach()
    return (q[..., None, :] @ states)[..., 0, :]


def _scores_switched_off(m: Written, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    scores = torch.tril(q @ k.mT)
    torch.set_grad_enabled(before)
    return scores @ v


def _scores_in_inference_mode(m: Written, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.inference_mode():
        scores = torch.tril(q.detach() @ k.detach().mT)
    return scores.clone() @ v


def _window_of_gradients(m: Written, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, out = x.new_zeros(len(x), WIDTH, WIDTH), []
    for t in range(x.shape[1]):
        state = state.data if t % 4 == 0 else state
        state = state + k[:, t, :, None] * v[:, t, None]
        out.append((q[:, t, None] @ state)[:, 0])
    return torch.stack(out, 1)


def _teacher(m: Written, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    student = mix(q, k, v)
    with torch.no_grad():
        target = mix(q, k, v)
    return student * target.sigmoid()


@pytest.mark.parametrize(
    "function",
    [
        _scores_scaled,
        _scores_reversed,
        _states_stopped,
        _scores_switched_off,
        _scores_in_inference_mode,
        _window_of_gradients,
        _teacher,
    ],
)
def test_inside_of_a_mixer(function: object) -> None:
    """Converted or declined, gradients are the program's."""
    same(function)  # type: ignore[arg-type]


def test_declined_with_the_line() -> None:
    report, _ = same(_scores_scaled)
    assert not report.converted
    assert "gradient is stopped inside" in report.declined[0].reason
    assert "in _scores_scaled" in report.declined[0].reason


def _all_in_half(m: Written, x: Tensor, *_: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return mix(m.query(x), m.key(x), m.value(x))


def _float_inside(m: Written, x: Tensor, *_: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        q, k, v = m.query(x), m.key(x), m.value(x)
        with torch.autocast("cpu", enabled=False):
            o = mix(q.float(), k.float(), v.float())
        return m.out(o)


def _projected_in_half(m: Written, x: Tensor, q: Tensor, *_: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        k, v = m.key(x), m.value(x)
    return m.out(mix(q, k.float(), v.float()))


def _scores_in_half(m: Written, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        scores = torch.tril(q @ k.mT)
    return scores.float() @ v


def _switched_off(m: Written, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return m.out(mix(q, k, v))


@pytest.mark.parametrize(
    ("function", "converted"),
    [
        (_all_in_half, True),
        (_float_inside, True),
        (_projected_in_half, True),
        (_switched_off, True),
        (_scores_in_half, False),
    ],
)
def test_autocast_inside_of_a_forward(function: object, converted: bool) -> None:
    """The output has eager's dtype, and its values up to the rounding of 16 bits."""
    report, model = same(function, tolerance=2e-2)  # type: ignore[arg-type]
    assert bool(report.converted) is converted
    if converted:
        assert moves(model) > 1e-2
    else:
        assert "autocast changes inside" in report.declined[0].reason


def test_under_an_autocast_around_the_call() -> None:
    """The usual training in 16 bits: one autocast around everything."""
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):  # it would keep the weights as they were
        report, model = same(lambda m, x, q, k, v: m.out(mix(q, k, v)), tolerance=2e-2)
        assert len(report.converted) == 1
        assert moves(model) > 1e-2
    assert example().dtype == torch.float32
