"""A call with one token: a hand-written mixer acts there as it does on the first token of a longer call."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import llcompile
from llcompile.errors import MissedLevelWeightsError
from tests.helpers.block import compiled, difference, perturb, weights_of

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Layer(nn.Module):
    """Two heads of four; `rule(q, k, v, g)` mixes operands [B, T, H, K] with a gate [B, T, H] in (0, 1)."""

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.rule, self.qkv, self.gate, self.out = rule, nn.Linear(8, 24), nn.Linear(8, 2), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).unbind(2)
        return x + self.out(self.rule(q, k, v, self.gate(x).sigmoid()).flatten(2))


def quadratic(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    return torch.einsum("bhts,bshv->bthv", torch.einsum("bthk,bshk->bhts", q, k).tril(), v) * g[..., None]


def fading(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    total = g.log().cumsum(1).transpose(1, 2)
    decay = (total[..., :, None] - total[..., None, :]).tril().exp().tril()
    return ((q.transpose(1, 2) @ k.transpose(1, 2).mT) * decay @ v.transpose(1, 2)).transpose(1, 2)


def normalised(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    q, k = F.elu(q) + 1, F.elu(k) + 1
    scores = torch.einsum("bthk,bshk->bhts", q, k).tril()
    return torch.einsum("bhts,bshv->bthv", scores, v * g[..., None]) / scores.sum(-1).transpose(1, 2).unsqueeze(-1)


def steps(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    state, out = 0.0, []
    for t in range(q.shape[1]):
        state = g[:, t, :, None, None] * state + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        out.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(out, 1)


def delta(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    k, state, out = F.normalize(k, dim=-1), q.new_zeros(len(q), 2, 4, 4), []
    for t in range(q.shape[1]):
        old = torch.einsum("bhk,bhkv->bhv", k[:, t], state)
        new = g[:, t, :, None] * (v[:, t] - old)
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], new)
        out.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(out, 1)


def written_to(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """What is written to the output afterwards acts on the weighed one, also through a view of it."""
    o = torch.einsum("bhts,bshv->bthv", torch.einsum("bthk,bshk->bhts", q, k).tril(), v)
    o.mul_(0.5)
    part = o[..., 2:]
    part += g[..., None]
    return o


RULES = [quadratic, fading, normalised, steps, delta, written_to]


def data(tokens: int, batch: int = 2) -> Tensor:
    return torch.randn(4, 9, 8, generator=torch.Generator().manual_seed(4))[:batch, :tokens].contiguous()


def converted(rule: Rule) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(Layer(rule), Layer(rule))
    assert len(llcompile.convert(model, data(9), verify=False).converted) == 2
    perturb(weights_of(model))
    return model


@pytest.mark.parametrize("rule", RULES)
def test_it_is_the_first_token_of_a_longer_call(rule: Rule) -> None:
    """Output and gradients: also of the level weights, which the first token alone says something about."""
    model = converted(rule)
    run = compiled(model)
    results = []
    for tokens in (9, 1):
        out = run(data(tokens))[:, :1]
        results.append((out.detach(), torch.autograd.grad(out.square().sum(), list(model.parameters()))))
    (want, wanted), (got, grads) = results
    assert difference(got, want) < 1e-5
    for grad, other in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-5)
    if rule is not normalised:  # where the one weight cancels
        assert difference(got, model(data(1))) > 1e-3  # the control: without level weights it is another output
        assert all(bool(g.abs().max() > 0) for g, p in zip(grads, model.parameters(), strict=True) if _acts(model, p))


def _acts(model: nn.Module, parameter: nn.Parameter) -> bool:
    return any(parameter is own for own in weights_of(model))


def test_another_batch_and_the_first_call() -> None:
    """One token is what the model is called with first, in a batch of another size, from a copy and from a pickle."""
    model = converted(quadratic)
    with torch.no_grad():
        want = compiled(model)(data(9, batch=3))[:, :1]
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch._dynamo.reset()
            assert difference(compiled(other)(data(1, batch=3)), want) < 1e-5


def test_a_module_that_is_called_twice() -> None:
    layer = Layer(quadratic)
    model = nn.Sequential(layer, layer)
    llcompile.convert(model, data(9), verify=False)
    perturb(weights_of(model))
    run = compiled(model)
    with torch.no_grad():
        assert difference(run(data(1)), run(data(9))[:, :1]) < 1e-5


def test_other_kinds() -> None:
    """Level weights that read nothing, and the linear operator."""
    model = nn.Sequential(Layer(fading))
    llcompile.convert(model, data(9), options={"level_weights": "static"}, verify=False)
    perturb(weights_of(model))
    run = compiled(model)
    with torch.no_grad():
        assert difference(run(data(1)), run(data(9))[:, :1]) < 1e-5
        assert difference(compiled(model, level_weights="none")(data(1)), model(data(1))) < 1e-6


class Continues(nn.Module):
    """Goes on from a state."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor, state: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        out = []
        state = x.new_zeros(len(x), 8, 8) if state is None else state
        for t in range(x.shape[1]):
            state = state + k[:, t, :, None] * v[:, t, None]
            out.append((q[:, t, None] @ state)[:, 0])
        return torch.stack(out, 1)


def test_a_state_that_comes_in_is_refused() -> None:
    """The token then reads the past through it: the weight of level 0 would be the wrong one."""
    model = Continues()
    llcompile.convert(model, data(9), verify=False)
    perturb(weights_of(model))
    run = compiled(model)
    with torch.no_grad():
        assert difference(run(data(1)), run(data(9))[:, :1]) < 1e-5  # the control
        with pytest.raises(MissedLevelWeightsError, match="it received a state"):
            run(data(1), torch.randn(2, 8, 8))
