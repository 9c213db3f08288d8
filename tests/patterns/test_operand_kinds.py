"""What is done to queries, keys and values before they are mixed stays in the graph, whatever operation it is."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import llcompile
from tests.helpers.small import difference

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

WIDTH, HEADS = 8, 2
Operands = tuple[Tensor, Tensor, Tensor]


def mixed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Linear attention, [B, T, H, K]."""
    scores = torch.einsum("bthk,bshk->bhts", q, k).tril()
    return torch.einsum("bhts,bshv->bthv", scores, v)


class Layer(nn.Module):
    """`function` makes the output [B, T, H, V] of queries, keys and values, and of what the module holds."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function
        self.qkv, self.gate = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, HEADS)
        self.norm = nn.BatchNorm1d(WIDTH, affine=False)
        self.skip = nn.Parameter(torch.rand(HEADS, 1) + 0.5)
        self.first = nn.Parameter(torch.randn(HEADS, 4, 4) / 2)
        self.taps = nn.Parameter(torch.randn(3, HEADS, 4))
        turns = torch.outer(torch.arange(64), torch.tensor([1.0, 0.1]))
        self.register_buffer("turns", torch.polar(torch.ones_like(turns), turns)[:, None])

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, 4)).unbind(2)
        return self.function(self, x, q, k, v).flatten(2)


def example(tokens: int = 20, seed: int = 3) -> Tensor:
    return torch.randn(2, tokens, WIDTH, generator=torch.Generator().manual_seed(seed))


def gradients(run: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output, and the gradients of all parameters but the level weights."""
    model.zero_grad()
    o = run(x)
    o.sin().sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if "loglinear" not in n and p.grad is not None}
    return {"output": o.detach(), **found}


def becomes(function: Callable[..., Tensor], family: tuple[str, str] = ("none", "none"), train: bool = False) -> None:
    """It is found as this family, nothing changes, at this length and another, and the level weights act."""
    torch.manual_seed(0)
    model = Layer(function).train(train)
    control, x = copy.deepcopy(model), example()
    report = llcompile.convert(model, x)
    assert [(c.decay, c.correction) for c in report.converted] == [family], str(report)
    run = torch.compile(model, backend="loglinear", options={"inner": "eager"})
    for tokens in (x, example(33, seed=4)):
        got, want = gradients(run, model, tokens), gradients(control, control, tokens)
        assert got.keys() == want.keys()
        for name, number in want.items():
            assert difference(got[name], number) < 1e-4, name
    before = run(x).detach()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "loglinear" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    after = run(x)
    assert difference(after, before) > 1e-3
    after.sum().backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "loglinear" in n)


def stays(function: Callable[..., Tensor], reason: str = "") -> None:
    """It is not converted, and computes what it did."""
    model, x = Layer(function), example()
    report = llcompile.inspect(model, x).report
    assert report.converted == (), str(report)
    assert any(reason in d.reason for d in report.declined) or not reason, str(report)
    run = torch.compile(model, backend="loglinear", options={"inner": "eager"})
    with torch.no_grad():
        assert difference(run(x), model(x)) < 1e-6


# -- operations that no axis rule knows, and features that are products


def turned(m: Layer, z: Tensor) -> Tensor:
    pairs = torch.view_as_complex(z.float().reshape(*z.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * m.turns[None, : z.shape[1]]).flatten(3).type_as(z)


def spectrum(m: Layer, z: Tensor) -> Tensor:
    made = torch.fft.fft(z, norm="ortho")
    return torch.cat([made.real, made.imag], -1)


def normed(m: Layer, z: Tensor) -> Tensor:
    return m.norm(z.flatten(0, 1).flatten(1)).view_as(z)


def windows(m: Layer, z: Tensor) -> Tensor:
    return z.unfold(-1, 2, 1).amax(-1)


def ranked(m: Layer, z: Tensor) -> Tensor:
    return torch.take_along_dim(z, z.argsort(-1), -1)


def second_degree(m: Layer, z: Tensor) -> Tensor:
    return torch.einsum("bthi,bthj->bthij", z, z).flatten(-2)


FEATURES = [turned, spectrum, windows, ranked, second_degree]


@pytest.mark.parametrize("feature", FEATURES)
def test_features_of_any_operation(feature: Callable[[Layer, Tensor], Tensor]) -> None:
    becomes(lambda m, x, q, k, v: mixed(feature(m, q), feature(m, k), v))


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_batch_norm(train: bool) -> None:
    becomes(lambda m, x, q, k, v: mixed(normed(m, q), normed(m, k), v), train=train)


def test_features_of_scores_are_none() -> None:
    """The same operation on the scores, along time, is no feature map."""

    def function(m: Layer, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("bthk,bshk->bhts", q, k).tril()
        return torch.einsum("bhts,bshv->bthv", torch.fft.fft(scores).real, v)

    stays(function)


# -- operands that mix positions themselves


def before(z: Tensor, by: int = 1) -> Tensor:
    """The tokens before, zeros in front."""
    return torch.cat([torch.zeros_like(z[:, :by]), z[:, :-by]], 1)


def token_shift(m: Layer, z: Tensor) -> Tensor:
    return z + (before(z) - z) * m.taps[0].sigmoid()


def taps(m: Layer, z: Tensor) -> Tensor:
    padded = nn.functional.pad(z, (0, 0, 0, 0, 2, 0))
    return sum(padded[:, i : i + z.shape[1]] * m.taps[i] for i in range(3))  # type: ignore[return-value]


def running_maximum(m: Layer, z: Tensor) -> Tensor:
    return (z - torch.cummax(z, 1)[0]).exp()


def moving_average(m: Layer, z: Tensor) -> Tensor:
    rows = [z[:, 0]]
    for t in range(1, z.shape[1]):
        rows.append(0.5 * rows[-1] + 0.5 * z[:, t])
    return torch.stack(rows, 1)


OWN = [token_shift, taps, running_maximum, moving_average]


@pytest.mark.parametrize("own", OWN)
def test_keys_that_are_made_of_several_tokens(own: Callable[[Layer, Tensor], Tensor]) -> None:
    becomes(lambda m, x, q, k, v: mixed(q, own(m, k), v))


@pytest.mark.parametrize("own", [token_shift, taps])
def test_queries_keys_and_values_that_are(own: Callable[[Layer, Tensor], Tensor]) -> None:
    becomes(lambda m, x, q, k, v: mixed(*(own(m, z) for z in (q, k, v))))


def test_with_dropout_on_them() -> None:
    model, x = Layer(lambda m, x, q, k, v: mixed(q, nn.functional.dropout(taps(m, k), 0.2), v)), example()
    assert len(llcompile.convert(model.train(), x).converted) == 1


def test_with_a_decay() -> None:
    def function(m: Layer, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        total = nn.functional.logsigmoid(m.gate(x)).cumsum(1).mT  # [B, H, T]
        decays = (total[..., None] - total[:, :, None]).tril().exp().tril()
        scores = torch.einsum("bthk,bshk->bhts", q, taps(m, k)) * decays
        return torch.einsum("bhts,bshv->bthv", scores, v)

    becomes(function, ("scalar", "none"))


def test_in_a_loop() -> None:
    def function(m: Layer, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        state, rows = torch.zeros(len(x), HEADS, 4, 4), []
        for one, key, value in zip(q.unbind(1), taps(m, k).unbind(1), token_shift(m, v).unbind(1), strict=True):
            state = state + key[..., None] * value[..., None, :]
            rows.append((one[..., None] * state).sum(-2))
        return torch.stack(rows, 1)

    becomes(function)


def after(z: Tensor) -> Tensor:
    return torch.cat([z[:, 1:], torch.zeros_like(z[:, :1])], 1)


def backwards(m: Layer, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return mixed(q.flip(1), k.flip(1), v.flip(1)).flip(1)


NOT_OWN = {
    "the key after": lambda m, x, q, k, v: mixed(q, k + after(k), v),
    "the key after, by taps that all share": lambda m, x, q, k, v: mixed(taps(m, q), taps(m, k + after(k)), taps(m, v)),
    "keys less their mean": lambda m, x, q, k, v: mixed(q, k - k.mean(1, keepdim=True), v),
    "backwards": backwards,
}


@pytest.mark.parametrize("name", NOT_OWN)
def test_what_looks_ahead(name: str) -> None:
    """What level weights weigh is the past of a token and the token itself."""
    stays(NOT_OWN[name])


def test_keys_and_values_of_the_token_before() -> None:
    becomes(lambda m, x, q, k, v: mixed(q, before(k), before(v)))


# -- what is added to the sum: the token's own value, a state at the start


def scored(q: Tensor, k: Tensor) -> Tensor:
    return torch.einsum("bthk,bshk->bhts", q, k).tril()


def applied(scores: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhts,bshv->bthv", scores, v)


def own(x: Tensor) -> Tensor:
    return torch.eye(x.shape[1])


def faded(m: Layer, x: Tensor) -> Tensor:
    total = nn.functional.logsigmoid(m.gate(x)).cumsum(1).mT  # [B, H, T]
    return (total[..., None] - total[:, :, None]).tril().exp().tril()


SKIPS: dict[str, tuple[Callable[..., Tensor], str]] = {
    "of each head": (lambda m, x, q, k, v: applied((scored(q, k) + m.skip[..., None] * own(x)) / 3, v), "none"),
    "a number": (lambda m, x, q, k, v: applied(scored(q, k) + 2 * own(x), v), "none"),
    "of each token": (lambda m, x, q, k, v: applied(scored(q, k) + torch.diag_embed(m.gate(x).mT), v), "none"),
    "with a decay": (
        lambda m, x, q, k, v: applied(scored(q, k) * faded(m, x) + m.skip[..., None] * own(x), v),
        "scalar",
    ),
    "a number alone": (lambda m, x, q, k, v: applied(scored(q, k).tril(-1) + own(x), v), "none"),
    "then a gate": (lambda m, x, q, k, v: m.gate(x)[..., None] * applied(scored(q, k) + own(x), v), "none"),
}


@pytest.mark.parametrize("name", SKIPS)
def test_a_number_on_the_diagonal(name: str) -> None:
    function, decay = SKIPS[name]
    becomes(function, (decay, "none"))


def from_first(m: Layer, x: Tensor, q: Tensor, k: Tensor, v: Tensor, kind: str) -> Tensor:
    state, rows, gates = m.first.tanh().expand(len(x), -1, -1, -1), [], m.gate(x).sigmoid()[..., None, None]
    k = nn.functional.normalize(k, dim=-1)
    for t in range(x.shape[1]):
        key, value = k[:, t, :, :, None], v[:, t, :, None]
        if kind == "decay":
            state = state * gates[:, t]
        read = (key * state).sum(-2, keepdim=True) if kind == "delta" else 0.0
        state = state + (gates[:, t] if kind == "delta" else 0.5) * key * (value - read)
        rows.append((q[:, t, :, None] @ state).squeeze(-2) * 0.25)
    return torch.stack(rows, 1)


STARTS = {"sum": ("none", "none"), "decay": ("scalar", "none"), "delta": ("none", "delta")}


@pytest.mark.parametrize("kind", STARTS)
def test_a_learned_state_at_the_start(kind: str) -> None:
    becomes(lambda m, x, q, k, v: from_first(m, x, q, k, v, kind), STARTS[kind])


def test_it_is_added_to_a_cumulative_sum() -> None:
    def function(m: Layer, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q[..., None] * (m.first + (k[..., None] * v[..., None, :]).cumsum(1))).sum(-2)

    becomes(function)


NO_ADDITION: dict[str, Callable[..., Tensor]] = {
    "the diagonal and the one below": lambda m, x, q, k, v: applied(
        scored(q, k) + own(x) + own(x).roll(1, 0).tril(), v
    ),
    "a mean of the values": lambda m, x, q, k, v: applied(scored(q, k) + torch.ones(len(x[0]), len(x[0])).tril(), v),
    "a state that is kept squared": lambda m, x, q, k, v: (
        q[..., None] * (m.first + (k[..., None] * v[..., None, :]).cumsum(1)).square()
    ).sum(-2),
}


@pytest.mark.parametrize("name", NO_ADDITION)
def test_other_additions(name: str) -> None:
    stays(NO_ADDITION[name])


def test_one_token_is_weighed_without_its_skip() -> None:
    """What no level weighs is not weighed in a call of one token either."""
    model, x = Layer(SKIPS["of each head"][0]), example()
    assert len(llcompile.convert(model, x).converted) == 1
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "loglinear" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
        run = torch.compile(model, backend="loglinear", options={"inner": "eager"})
        whole = run(x)
        with pytest.raises(Exception, match="does not read them"):
            run(x[:, :1])
        assert difference(run(x), whole) < 1e-6


# -- divisors of decays alone stay in the graph


def weighted_mean(m: Layer, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    decays = faded(m, x)  # [B, H, T, S]
    return applied(scored(q, k) * decays, v) / decays.sum(-1).mT[..., None]


def stabilised(m: Layer, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """xLSTM's matrix memory, parallel, with an epsilon behind the maximum."""
    total = nn.functional.logsigmoid(m.gate(x)).cumsum(1).mT  # [B, H, T]
    log = total[..., None] - total[..., None, :] + m.gate(x.tanh()).mT[..., None, :]
    log = torch.where(torch.ones(len(x[0]), len(x[0])).tril().bool(), log, -float("inf"))
    top = log.max(-1, keepdim=True).values
    scores = torch.einsum("bthk,bshk->bhts", q, k) * (log - top).exp() / 2
    length = torch.maximum(scores.sum(-1, keepdim=True).abs(), (-top).exp())
    return applied(scores / (length + 1e-6), v)


def stabilised_behind(m: Layer, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same, divided behind the sum."""
    total = nn.functional.logsigmoid(m.gate(x)).cumsum(1).mT
    log = total[..., None] - total[..., None, :] + m.gate(x.tanh()).mT[..., None, :]
    log = log.masked_fill(torch.ones(len(x[0]), len(x[0])).triu(1) > 0, -float("inf"))
    top = log.amax(-1, keepdim=True)
    scores = torch.einsum("bthk,bshk->bhts", q, k) * (log - top).exp() / 2
    length = torch.maximum(scores.sum(-1, keepdim=True).abs(), (-top).exp()) + 1e-6
    return applied(scores, v) / length.transpose(1, 2)


def in_chunks(
    m: Layer, x: Tensor, q: Tensor, k: Tensor, v: Tensor, least: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """The same in chunks, sum and divisor [B, N, C, H, .]: the states carry the largest exponent so far with them."""
    chunk = 11 if len(x[0]) % 11 == 0 else 5
    cut = lambda z: z.unflatten(1, (-1, chunk))  # noqa: E731
    q, k, v, write = map(cut, (q, k, v, m.gate(x.tanh())))
    total = cut(nn.functional.logsigmoid(m.gate(x))).cumsum(2)  # [B, N, C, H]
    left = total[:, :, -1:] - total + write
    state, keys, top = q.new_zeros(len(x), HEADS, 4, 4), q.new_zeros(len(x), HEADS, 4), q.new_zeros(len(x), HEADS)
    states, sums, tops = [], [], []
    for n in range(q.shape[1]):
        states.append(state), sums.append(keys), tops.append(top)
        before, top = total[:, n, -1] + top, torch.maximum(total[:, n, -1] + top, left[:, n].amax(1))
        written = k[:, n] * (left[:, n] - top[:, None]).exp()[..., None]
        state = (before - top).exp()[..., None, None] * state + torch.einsum("bchk,bchv->bhkv", written, v[:, n])
        keys = (before - top).exp()[..., None] * keys + written.sum(1)
    log = total[:, :, :, None] - total[:, :, None] + write[:, :, None]  # [B, N, C, S, H]
    log = log.masked_fill(torch.ones(chunk, chunk).triu(1).bool()[..., None], -float("inf"))
    past = total + torch.stack(tops, 1)[:, :, None]
    top = torch.maximum(past, log.amax(3))
    scores = torch.einsum("bnchk,bnshk->bncsh", q, k) * (log - top[:, :, :, None]).exp() / 2
    q = q * (past - top).exp()[..., None] / 2
    summed = torch.einsum("bnchk,bnhkv->bnchv", q, torch.stack(states, 1))
    summed = summed + torch.einsum("bncsh,bnshv->bnchv", scores, v)
    length = torch.einsum("bnchk,bnhk->bnch", q, torch.stack(sums, 1)) + scores.sum(3)
    return summed, torch.maximum(length.abs(), least(top, k))[..., None] + 1e-6


def stabilised_in_chunks(m: Layer, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    summed, length = in_chunks(m, x, q, k, v, lambda top, k: (-top).exp())
    return (summed / length).flatten(1, 2)


def least_of_keys(m: Layer, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    summed, length = in_chunks(m, x, q, k, v, lambda top, k: k.exp().sum(-1).cumsum(2))
    return (summed / length).flatten(1, 2)


@pytest.mark.parametrize("function", [weighted_mean, stabilised, stabilised_behind, stabilised_in_chunks])
def test_a_divisor_of_decays(function: Callable[..., Tensor]) -> None:
    becomes(function, ("scalar", "none"))


def of_keys(m: Layer, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    decays = faded(m, x)
    return applied(scored(q, k) * decays, v) / (1 + decays.sum(-1).mT[..., None] + k.exp().cumsum(1).sum(-1, True))


@pytest.mark.parametrize("function", [of_keys, least_of_keys])
def test_a_divisor_of_keys_is_another_mixing(function: Callable[..., Tensor]) -> None:
    stays(function, "its denominator")


# -- a product of a sequence and a weight is an operand, though it is larger than the sequence


def remembered(m: Layer, x: Tensor, q: Tensor, k: Tensor, v: Tensor, of_keys: bool) -> Tensor:
    """A loop with a decay for each channel, learned, which a gate for each head makes longer."""
    decay = (m.taps[0].sigmoid() * (1 + 0.2 * m.gate(x).sigmoid()[..., None])).clamp(max=0.99)  # [B, T, H, 4]
    state, made = q.new_zeros(len(x), HEADS, 4, 4), []
    for t in range(x.shape[1]):
        kept = decay[:, t, :, :, None] if of_keys else decay[:, t, :, None]
        state = kept * state + k[:, t, :, :, None] * v[:, t, :, None]
        made.append((q[:, t, :, None] @ state)[..., 0, :])
    return torch.stack(made, 1)


def test_a_decay_of_a_gate_and_a_weight() -> None:
    becomes(lambda *given: remembered(*given, of_keys=True), ("channel", "none"))


def test_a_decay_of_values_is_none_of_keys() -> None:
    stays(lambda *given: remembered(*given, of_keys=False), "value")


# -- zeros and ones


def test_features_of_zeros_and_ones() -> None:
    def spikes(m: Layer, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return mixed((q > 0).float(), torch.where(k > 0, 1.0, 0.0) * k.tanh(), v)

    becomes(spikes)
    with torch.no_grad():
        assert len(llcompile.inspect(Layer(spikes), example()).report.converted) == 1


def test_scores_of_zeros_and_ones_are_none_of_a_mixer() -> None:
    def spikes(m: Layer, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (torch.einsum("bthk,bshk->bhts", q, k) > 0).float().tril()
        return torch.einsum("bhts,bshv->bthv", scores, v)

    stays(spikes, "not linear in the query")
