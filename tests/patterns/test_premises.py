"""What a part was read for holds in every later call: lengths, numbers of buffers, magnitudes, the order of tokens."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import llcompile
from llcompile.backend import last_report, loglinear
from tests.helpers.small import difference, perturb

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

WIDTH = 12


class Layer(nn.Module):
    """A mixer `function(self, x, q, k, v)`."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.gate = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x, self.q(x), self.k(x), self.v(x))


def tokens(length: int, seed: int = 0) -> Tensor:
    return torch.randn(2, length, WIDTH, generator=torch.Generator().manual_seed(seed))


def converted(model: nn.Module, x: Tensor) -> tuple[Any, llcompile.Report]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = llcompile.convert(model, x, verify=False)
    return torch.compile(model, backend="loglinear", options={"inner": "eager"}), report


def acts(run: Any, model: nn.Module, x: Tensor) -> None:
    before = run(x).detach()
    perturb(model)
    assert difference(run(x), before) > 1e-3, "the level weights have no part in the output"


def plain(m: Layer, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).tril() @ v


# -- lengths


def lags(x: Tensor) -> Tensor:
    positions = torch.arange(x.shape[1])
    return positions[:, None] - positions


def by_root_of_length(m: Layer, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q * x.size(1) ** -0.5 @ k.mT).tril() @ v


def by_a_tensor_of_the_length(m: Layer, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).tril() / torch.tensor(float(x.shape[1])) @ v


def filled_with_a_share(m: Layer, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = x.shape[1]
    return ((q @ k.mT) * torch.full((t, t), 3 / t).tril()) @ v


def decays_by_share(m: Layer, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT) * torch.exp(lags(x) * (-2.0 / x.shape[1])).tril()) @ v


def decays_by_number(m: Layer, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT) * (0.9 ** lags(x).clamp(min=0)).masked_fill(lags(x) < 0, 0)) @ v


MIXERS = [plain, by_root_of_length, by_a_tensor_of_the_length, filled_with_a_share, decays_by_share, decays_by_number]


@pytest.mark.parametrize("function", MIXERS)
def test_a_mixer_whose_numbers_follow_the_length(function: Any) -> None:
    """It is right at each of several lengths, and the level weights act at each."""
    model = Layer(function)
    run, report = converted(model, tokens(24))
    assert len(report.converted) == 1, report
    for length in (24, 31, 90):
        x = tokens(length)
        assert difference(run(x), model(x)) < 1e-4
    acts(run, model, tokens(57))


@pytest.mark.parametrize(("function", "graphs"), [(plain, 2), (decays_by_number, 2), (decays_by_share, 4)])
def test_only_what_follows_the_length_is_compiled_for_each(function: Any, graphs: int) -> None:
    model = Layer(function)
    converted(model, tokens(24))
    count = 0

    def counted(module: Any, inputs: Any, **given: Any) -> Any:
        nonlocal count
        count += 1
        return loglinear(module, inputs, options={"inner": "eager"}, **given)

    counted._llcompile = True  # type: ignore[attr-defined]
    run = torch.compile(model, backend=counted)
    for length in (24, 31, 57, 90):
        run(tokens(length))
    assert count == graphs


def test_a_length_that_must_vary() -> None:
    """What is known at one length is left alone where the user demands a graph for all; the control is rewritten."""
    for function, found in ((plain, 1), (decays_by_share, 0)):
        torch._dynamo.reset()
        model, x = Layer(function), tokens(24)
        torch._dynamo.mark_dynamic(x, 1)
        run = torch.compile(model, backend="loglinear", options={"inner": "eager"})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert difference(run(x), model(x)) < 1e-4
            assert difference(run(tokens(39)), model(tokens(39))) < 1e-4
        assert len(last_report().converted) == found


def of_whole_numbers(m: Layer, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    block = torch.div(torch.arange(x.shape[1]), 100, rounding_mode="floor")
    return ((q @ k.mT) * ((lags(x) >= 0) & (block[:, None] == block))) @ v


def of_remainders(m: Layer, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    place = torch.arange(x.shape[1]) % 100
    return ((q @ k.mT) * ((lags(x) >= 0) & (place[:, None] >= place))) @ v


def of_bits(m: Layer, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    place = torch.arange(x.shape[1]) & 63
    return ((q @ k.mT) * ((lags(x) >= 0) & (place[:, None] >= place))) @ v


def within_a_window(m: Layer, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT) * ((lags(x) >= 0) & (lags(x) < 80))) @ v


def slower_from_somewhere(m: Layer, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT) * torch.exp(-0.1 * lags(x).clamp(0, 64)).tril()) @ v


@pytest.mark.parametrize("function", [of_whole_numbers, of_remainders, of_bits, within_a_window, slower_from_somewhere])
def test_what_happens_beyond_the_example_is_no_mixer(function: Any) -> None:
    """It is declined at the line that does nothing yet, and right where it does something."""
    model = Layer(function)
    run, report = converted(model, tokens(24))
    assert report.converted == ()
    assert "at length 24" in report.declined[0].reason
    assert "test_premises.py" in report.declined[0].reason
    for length in (24, 31, 130):
        assert difference(run(tokens(length)), model(tokens(length))) < 1e-4


def by_its_blocks(m: Layer, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores inside of blocks of 8 and between them: all of the past, by whole numbers that are seen to step."""
    block, scores = torch.arange(x.shape[1]) // 8, (q @ k.mT).tril()
    same = block[:, None] == block
    return (scores * same) @ v + (scores * ~same) @ v


def test_steps_that_the_example_takes() -> None:
    model = Layer(by_its_blocks)
    run, report = converted(model, tokens(24))
    assert len(report.converted) == 1, report
    for length in (24, 31, 40):
        assert difference(run(tokens(length)), model(tokens(length))) < 1e-4
    acts(run, model, tokens(24))


# -- numbers that are read


class Held(Layer):
    """A mixer with a tensor that it reads."""

    def __init__(self, function: Callable[..., Tensor], **held: Tensor) -> None:
        super().__init__(function)
        for name, tensor in held.items():
            self.register_buffer(name, tensor)


def corner(m: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = x.shape[1]
    return ((q @ k.mT) * m.mask[:t, :t]) @ v


def retention(m: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT) * torch.exp(lags(x) * m.rate).tril()) @ v


def by_a_rate_outside(m: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The buffer stands before the mixer: it is only known to be negative by its numbers."""
    total = (F.softplus(m.gate(x)) * m.rate).cumsum(1)
    return ((q @ k.mT) * (total - total.mT).masked_fill(lags(x) < 0, -torch.inf).exp()) @ v


def scaled(m: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).tril() * m.size @ v


LOWER = torch.ones(64, 64).tril()
HELD: dict[str, tuple[Any, str, Tensor, Tensor]] = {
    "mask": (corner, "mask", LOWER, LOWER.triu(-5)),
    "rate": (retention, "rate", torch.tensor(-0.1), torch.tensor(-0.7)),
    "rate outside": (by_a_rate_outside, "rate", torch.tensor(-0.1), torch.tensor(-0.6)),
    "scale": (scaled, "size", torch.tensor(0.5), torch.tensor(-2.0)),
}


def in_place(m: Any, name: str, new: Tensor) -> None:
    getattr(m, name).copy_(new)


def through_data(m: Any, name: str, new: Tensor) -> None:
    getattr(m, name).data[...] = new


def another(m: Any, name: str, new: Tensor) -> None:
    setattr(m, name, new.clone())


@pytest.mark.parametrize("change", [in_place, through_data, another])
@pytest.mark.parametrize("case", HELD)
def test_a_buffer_that_changes(case: str, change: Any) -> None:
    """What was read is read again where it changed; what is a mixer still acts, and changing back does, too."""
    function, name, old, new = HELD[case]
    model = Held(function, **{name: old.clone()})
    x = tokens(24)
    run, report = converted(model, x)
    assert len(report.converted) == 1, report
    assert difference(run(x), model(x)) < 1e-4
    change(model, name, new)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if case != "mask":  # a window is no mixer
            assert difference(run(x), model(x)) < 1e-4
            assert len(last_report().converted) == 1
    change(model, name, old)
    assert difference(run(x), model(x)) < 1e-4
    acts(run, model, x)


def test_a_plain_attribute_that_changes() -> None:
    model = Layer(retention)
    model.rate = torch.tensor(-0.2)  # type: ignore[assignment]
    run, _ = converted(model, tokens(24))
    run(tokens(24))
    model.rate = torch.tensor(-0.9)  # type: ignore[assignment]
    assert difference(run(tokens(24)), model(tokens(24))) < 1e-4


def test_layers_that_share_code() -> None:
    """Compiled one by one, each has its own decay."""
    rates = (-0.1, -0.1, -0.8)
    layers = nn.Sequential(*(Held(retention, rate=torch.tensor(r)) for r in rates))
    x = tokens(20)
    want = layers(x)
    converted(layers, x)
    for layer in layers:
        layer.compile(backend="loglinear", options={"inner": "eager"})
    assert difference(layers(x), want) < 1e-4
    acts(layers, layers, x)


def test_a_corner_of_a_mask_says_nothing_of_the_rest() -> None:
    for mask, found in ((LOWER, 1), (LOWER.triu(-40), 0)):
        torch._dynamo.reset()
        model = Held(corner, mask=mask)
        run, report = converted(model, tokens(24))
        assert len(report.converted) == found
        for length in (24, 30, 60):
            assert difference(run(tokens(length)), model(tokens(length))) < 1e-4


# -- magnitudes


def held_in(m: Layer, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, out = x.new_zeros(len(x), WIDTH, WIDTH), []
    for t in range(x.shape[1]):
        state = F.hardtanh(state + k[:, t, :, None] * v[:, t, None], -500.0, 500.0)
        out.append((q[:, t, None] @ state)[:, 0])
    return torch.stack(out, 1)


def least(m: Layer, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.minimum(q @ k.mT, torch.tensor(60.0)).tril() @ v


def bounded_decay(m: Layer, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    total = F.logsigmoid(m.gate(x)).cumsum(1)
    return ((q @ k.mT) * (total - total.mT).clamp(-40, 0).exp().tril()) @ v


def rectified(m: Layer, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((F.celu(q, 2.0) + 1.5) @ (F.celu(k, 2.0) + 1.5).mT).relu().tril() @ v


def straight_softplus(m: Layer, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.leaky_relu(F.softplus(q - 50, 0.1) @ F.softplus(k, 3.0).mT - 0.0, 0.5).tril() @ v


def pinned(m: Layer, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = F.selu(q) + 1, F.selu(k) + 1
    d = (q * k.cumsum(1)).sum(-1, keepdim=True)
    return (q @ k.mT).tril() @ v / d.abs().clamp(min=0.5)


def positive(m: Layer, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The control: a rectifier that has nothing to do."""
    return (F.softplus(q) @ F.softplus(k).mT).relu().tril() @ v


SATURATING = [plain, held_in, least, bounded_decay, rectified, straight_softplus, pinned, positive]


@pytest.mark.parametrize("function", SATURATING)
def test_what_saturates(function: Any) -> None:
    """Right for ordinary numbers and for large ones, whether or not it is a mixer."""
    model, x = Layer(function), tokens(16)
    twin = copy.deepcopy(model)
    run, report = converted(model, x)
    with torch.no_grad():
        for size in (1.0, 9.0, 60.0):
            assert difference(run(x * size), twin(x * size)) < 1e-3
    if function in (plain, positive, straight_softplus):
        assert len(report.converted) == 1, report
        acts(run, model, x)
    if function in (held_in, least):
        assert report.converted == ()
    if function is least:
        assert "test_premises.py" in report.declined[0].reason


def noisy(m: Layer, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout((q @ k.mT).tril(), 0.1, m.training) @ v


def rounded(m: Layer, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).tril().round() @ v


@pytest.mark.parametrize("function", [noisy, rounded])
def test_what_no_draw_can_prove(function: Any) -> None:
    _, report = converted(Layer(function), tokens(16))
    assert report.converted == ()
    assert len(converted(Layer(plain), tokens(16))[1].converted) == 1


# -- the order of tokens


def backwards(m: Layer, x: Tensor, *_: Tensor) -> Tensor:
    y = x.flip(1)
    return plain(m, y, m.q(y), m.k(y), m.v(y)).flip(1)


def shuffled(m: Layer, x: Tensor, *_: Tensor) -> Tensor:
    order = torch.arange(x.shape[1]) * 5 % x.shape[1]
    y = x[:, order]
    return plain(m, y, m.q(y), m.k(y), m.v(y))[:, order.argsort()]


def in_columns(m: Layer, x: Tensor, *_: Tensor) -> Tensor:
    y = x.unflatten(1, (4, 6)).transpose(1, 2).flatten(1, 2)
    return plain(m, y, m.q(y), m.k(y), m.v(y)).unflatten(1, (6, 4)).transpose(1, 2).flatten(1, 2)


@pytest.mark.parametrize("function", [plain, backwards, shuffled, in_columns])
@pytest.mark.parametrize("place", [5, 17])
def test_a_token_reaches_what_it_reached(function: Any, place: int) -> None:
    """With any level weights: those of a token weigh what the token reads."""
    model, x = Layer(function), tokens(24)
    twin = copy.deepcopy(model)
    run, report = converted(model, x)
    if function is plain:
        assert len(report.converted) == 1
    if report.converted:
        perturb(model)
    changed = x.clone()
    changed[:, place] += 1
    with torch.no_grad():
        reached, may_reach = ((f(changed) - f(x)).abs().amax((0, 2)) > 1e-5 for f in (run, twin))
    assert not (reached & ~may_reach).any(), reached.nonzero().flatten().tolist()
    assert reached.any()
