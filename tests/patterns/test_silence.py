"""No mixer is passed over in silence: each is converted, or declined with a reason of its own, or named."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import llcompile
from llcompile.patterns.structure import found
from tests.helpers.small import difference

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

WIDTH = 8
Mixing = Callable[[Tensor, Tensor, Tensor], Tensor]


class Layer(nn.Module):
    """One mixer with projections of its own."""

    def __init__(self, mixing: Mixing) -> None:
        super().__init__()
        self.mixing = mixing
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.mixing(*self.qkv(x).chunk(3, -1))


class Stack(nn.Module):
    """Layers without an output projection, on a stream that each adds to."""

    def __init__(self, *mixings: Mixing) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Layer(mixing) for mixing in mixings)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + 0.5 * block(F.rms_norm(x, x.shape[-1:]))
        return x


def example(tokens: int = 24) -> Tensor:
    return torch.randn(2, tokens, WIDTH, generator=torch.Generator().manual_seed(3))


def linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).tril() @ v


def cubed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).pow(3).tril() @ v


def ahead(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).tril(1) @ v


def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], is_causal=True)[:, 0]


def said(model: nn.Module, x: Tensor) -> dict[str, str]:
    """Module -> what the report says of it."""
    report = llcompile.inspect(model, x)
    return {
        **{c.module: c.family for c in report.converted},
        **{d.module: d.reason for d in report.declined},
        **{u.module: u.kind for u in report.untouched},
    }


@pytest.mark.parametrize("mixings", [(cubed, linear, ahead), (ahead, ahead, ahead), (cubed, softmax, cubed)])
def test_layers_on_one_stream_keep_their_reasons(mixings: tuple[Mixing, ...]) -> None:
    """What a layer adds to is no part of it: each has the line that it has alone."""
    alone = [said(Stack(mixing), example())["blocks.0"] for mixing in mixings]
    assert said(Stack(*mixings), example()) == {f"blocks.{i}": words for i, words in enumerate(alone)}


# -- time, wherever it was born


class Framed(Layer):
    """A mixer, or another mixing, behind what makes or changes the axis of time."""

    def __init__(self, frame: str, mixing: Mixing = linear) -> None:
        super().__init__(mixing)
        self.frame = FRAMES[frame]
        self.table = nn.Parameter(torch.randn(1, 30, WIDTH))
        self.sink = nn.Parameter(torch.randn(3, WIDTH))
        self.shrink = nn.Conv1d(WIDTH, WIDTH, 3, 3)
        self.pool = nn.Linear(24 * WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.frame(self, x, super().forward)


FRAMES: dict[str, Callable[[Framed, Tensor, Callable[[Tensor], Tensor]], Tensor]] = {
    "control": lambda m, x, mixed: mixed(x),
    "a table that is scaled": lambda m, x, mixed: mixed(0.1 * m.table[:, 2 : 2 + x.shape[1]] + x),
    "a gate for each position": lambda m, x, mixed: mixed(x * m.table[0, : x.shape[1], :1].sigmoid()),
    "learned tokens in front": lambda m, x, mixed: mixed(torch.cat([m.sink.repeat(len(x), 1, 1), x], 1))[:, 3:],
    "a convolution of stride 3": lambda m, x, mixed: mixed(F.silu(m.shrink(x.mT)).mT),
    "every third token": lambda m, x, mixed: mixed(x[:, 1::3]),
    "a reader of all tokens": lambda m, x, mixed: m.pool(mixed(x).reshape(len(x), -1)),
}


@pytest.mark.parametrize("frame", FRAMES)
def test_time_is_what_is_mixed_in_order(frame: str) -> None:
    """Whether an input has the axis, a parameter has it as well, or the model makes it."""
    assert said(Framed(frame), example())[""] == "linear attention"


@pytest.mark.parametrize("frame", ["a table that is scaled", "learned tokens in front", "a reader of all tokens"])
def test_a_reason_names_what_the_mixing_does(frame: str) -> None:
    """The near miss in such a frame has the reason that it has without it."""
    control = said(Framed("control", cubed), example())[""]
    assert control == "not linear in the query"
    assert said(Framed(frame, cubed), example())[""] == control


def test_a_mixer_on_an_axis_that_the_model_makes_acts() -> None:
    model, x = Framed("learned tokens in front").eval(), example()
    want = model(x).detach()
    llcompile.convert(model, x)
    run = torch.compile(model, backend="loglinear", options={"inner": "eager"})
    assert difference(run(x), want) < 1e-5
    with torch.no_grad():
        for weight in model.loglinear.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    assert difference(run(x), want) > 1e-2


def channels(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Mixes features only."""
    return F.silu(q) * k + v.softmax(-1)


@pytest.mark.parametrize("frame", ["a table that is scaled", "learned tokens in front", "a reader of all tokens"])
@pytest.mark.parametrize("mixing", [channels, softmax])
def test_nothing_is_said_of_what_is_no_mixer(frame: str, mixing: Mixing) -> None:
    """The controls: no reason for an MLP, none but its name for softmax attention."""
    report = llcompile.inspect(Framed(frame, mixing), example())
    assert not report.converted
    assert not report.declined
    assert bool(report.untouched) == (mixing is softmax)


# -- loops


class Loop(nn.Module):
    """A loop over tokens with a learned decay, and a gate that reads queries and keys side by side."""

    def __init__(self, decays: Callable[[Tensor, Tensor], Tensor], width: int = WIDTH) -> None:
        super().__init__()
        self.decays, self.qkv, self.gate = decays, nn.Linear(width, 3 * width), nn.Linear(2 * width, 1)
        self.rates = nn.Parameter(torch.linspace(1.0, 2.0, 64))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        decays = self.decays(self.rates, x)
        state, rows = x.new_zeros(len(x), x.shape[2], x.shape[2]), []
        for t in range(x.shape[1]):
            write = self.gate(torch.cat((q[:, t], k[:, t]), -1)).sigmoid() * k[:, t]
            state = decays[:, t] * state + torch.einsum("bk,bv->bkv", write, v[:, t])
            rows.append(torch.einsum("bk,bkv->bv", q[:, t], state))
        return torch.stack(rows, 1)


def repeated(rates: Tensor, x: Tensor) -> Tensor:
    return rates[0].expand(len(x), x.shape[1], 1, 1).sigmoid()


def filled(rates: Tensor, x: Tensor) -> Tensor:
    return (rates[0] * x.new_ones(len(x), x.shape[1], 1, 1)).sigmoid()


def listed(rates: Tensor, x: Tensor) -> Tensor:
    return rates[: x.shape[1]].sigmoid().view(1, -1, 1, 1)


@pytest.mark.parametrize("decays", [repeated, filled])
def test_a_decay_that_is_repeated_over_time_is_one(decays: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert said(Loop(decays), example(18))[""] == "scalar-decay linear attention"


@pytest.mark.parametrize("tokens", [2 * WIDTH, WIDTH, 18])
def test_as_many_tokens_as_features(tokens: int) -> None:
    """Features that are put together are no time, though there are as many of them."""
    assert said(Loop(repeated), example(tokens))[""] == "scalar-decay linear attention"


def test_where_the_search_stops_is_said() -> None:
    """A decay of its own for each step: more operands than are tried."""
    words = said(Loop(listed), example(18))[""]
    assert "scalar-decay linear attention" in words or "the search stops at 16 operands" in words, words


# -- reasons


@torch.library.custom_op("silence::halved", mutates_args=())
def halved(x: Tensor) -> Tensor:
    return x / 2


@halved.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def into(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.matmul((q @ k.mT).tril(), v, out=torch.empty_like(v))


def through_a_stranger(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return halved((q @ k.mT).tril()) @ v


def dropped_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout(q @ k.mT, 0.2).tril() @ v


def dropped_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).tril() @ F.dropout(v, 0.2)


REASONS = {
    into: "it runs under torch.no_grad()",
    through_a_stranger: "scores pass through silence.halved",
    dropped_scores: "is random",
    dropped_values: "linear attention",
}


@pytest.mark.parametrize("mixing", REASONS, ids=lambda mixing: mixing.__name__)
def test_what_stands_in_the_way_is_named(mixing: Mixing) -> None:
    assert REASONS[mixing] in said(Layer(mixing), example())[""]


class Buffered(Layer):
    """Writes its output into a tensor that it reads afterwards."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        kept = torch.zeros(v.shape)
        out = torch.matmul((q @ k.mT).tril(), v, out=kept)
        return torch.cat([out, 2 * kept], -1)


def test_out_is_written_by_a_mixer_too() -> None:
    """Without gradients `out=` is a mixer: what it writes moves with the level weights."""
    model, x = Buffered(linear).eval(), example()
    with torch.no_grad():
        want = model(x)
        llcompile.convert(model, x)
        run = torch.compile(model, backend="loglinear", options={"inner": "eager"})
        assert difference(run(x), want) < 1e-5
        for weight in model.loglinear.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
        out, kept = run(x).chunk(2, -1)
    assert difference(out, want[..., :WIDTH]) > 1e-2
    assert difference(kept, 2 * out) < 1e-6


def faded(q: Tensor, k: Tensor, v: Tensor, divisor: str) -> Tensor:
    at = torch.arange(q.shape[1])
    fade = 0.8 ** (at[:, None] - at).clamp(min=0)
    scores = (q.sigmoid() @ k.sigmoid().mT * fade).tril()
    other = (q.sigmoid() @ k.sigmoid().mT).tril()
    return scores @ v / (scores if divisor == "own" else other).sum(-1, keepdim=True)


def test_a_constant_decay_is_in_the_denominator_as_well() -> None:
    """The decay is read off numbers twice, and the two readings differ in rounding."""
    own, other = (said(Layer(lambda q, k, v, d=d: faded(q, k, v, d)), example())[""] for d in ("own", "other"))
    assert own == "scalar-decay linear attention"
    assert other == "its denominator is not the sum of its scores"


# -- an example of one token


def summed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("btk,btkv->btv", q, torch.einsum("btk,btv->btkv", k, v).cumsum(1))


def looped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, rows = torch.zeros(len(q), WIDTH, WIDTH), []
    for one, key, value in zip(q.unbind(1), k.unbind(1), v.unbind(1), strict=True):
        state = state + key[:, :, None] * value[:, None]
        rows.append((one[:, None] @ state)[:, 0])
    return torch.stack(rows, 1)


@pytest.mark.parametrize("mixing", [linear, summed, looped])
def test_one_token_is_said_to_show_nothing(mixing: Mixing) -> None:
    one, several = (llcompile.inspect(Layer(mixing), example(tokens)) for tokens in (1, 12))
    assert not one.converted
    assert "a single token cannot show mixing" in str(one)
    assert one.to_dict()["remarks"] == one.report.remarks
    assert several.converted
    assert not several.remarks


@pytest.mark.parametrize("mixing", [channels, softmax])
def test_one_token_of_what_is_no_mixer(mixing: Mixing) -> None:
    """The controls: an MLP has nothing that runs over tokens, and attention has its name. So has a batch of one."""
    assert not llcompile.inspect(Layer(mixing), example(1)).remarks
    assert not llcompile.inspect(Layer(mixing), example()[:1]).remarks


# -- several in one module


class Several(nn.Module):
    """Mixings with projections of their own in one forward, one after the other or side by side."""

    def __init__(self, *mixings: Mixing, beside: bool = False) -> None:
        super().__init__()
        self.mixings, self.beside = mixings, beside
        self.projections = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in mixings)

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for mixing, projection in zip(self.mixings, self.projections, strict=True):
            q, k, v = projection(x if self.beside else out).chunk(3, -1)
            out = out + mixing(q, k, v)
        return out


@pytest.mark.parametrize("beside", [False, True])
def test_each_mixing_of_one_module_has_a_line(beside: bool) -> None:
    """In the order of the code; what is converted among them is no part of another's line."""
    report = llcompile.inspect(Several(cubed, linear, ahead, cubed, beside=beside), example())
    first, second, third = (declined.reason for declined in report.declined)
    assert len(report.converted) == 1
    assert first == third == "not linear in the query"
    assert second.startswith("not causal")


def masked_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two products of the same queries and keys: one mechanism."""
    scores = q @ k.mT
    return scores.pow(3).tril() @ v + scores.pow(3).triu(1) @ v.cos()


def test_one_mechanism_has_one_line() -> None:
    """The control: what shares its queries and keys is said once."""
    assert len(llcompile.inspect(Layer(masked_sum), example()).declined) == 1


def halves(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (F.glu(q) @ F.glu(k).mT).tril() @ v


def shuffled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = (F.channel_shuffle(x.mT.contiguous(), 2).mT for x in (q, k))
    return (q @ k.mT).tril() @ v


def test_operations_on_an_operand() -> None:
    """Axes are followed through an operation that no rule knows."""
    assert said(Layer(halves), example())[""] == "linear attention"
    assert said(Layer(shuffled), example())[""] == "linear attention"


def test_a_search_that_ends_early_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph gets as many steps as its size allows; what was not looked at is no silent miss."""
    monkeypatch.setattr(found, "BOUNDS", {"cuts": (1, 0.0)})
    report = llcompile.inspect(Twice(), torch.randn(2, 20, 16))
    assert len(report.converted) + len(report.declined) == 1
    assert re.search(r"ended at .*test_silence.py:\d+ in forward.*was not looked at", " ".join(report.remarks))


class Twice(nn.Module):
    """Linear attention, and linear attention with another decay."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        x = (q @ k.mT).tril() @ v
        q, k, v = self.qkv(x).chunk(3, -1)
        t = torch.arange(x.shape[1])
        return (q @ k.mT * (0.9 ** (t[:, None] - t)).tril()) @ v
