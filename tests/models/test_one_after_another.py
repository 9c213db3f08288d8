"""A mixer reads what the one before it returned, with nothing in between: the rewrite of the first takes that node
away, and the second reads the new one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.small import difference
from tests.models.written import Function, Written, agreeing, compiled, example, mix, same

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore::llcompile.errors.LLCompileWarning"),
]


def bare(m: Written, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return mix(q, k, v)


def gated(m: Written, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    total = nn.functional.logsigmoid(m.gate(x)).cumsum(1)
    decay = (total - total.mT).masked_fill(torch.ones(x.shape[1], x.shape[1]).triu(1).bool(), -torch.inf).exp()
    return ((q @ k.mT) * decay) @ v


def softmax(m: Written, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT, -1) @ v


def noise_moves_each(model: nn.Module, x: Tensor) -> bool:
    """Whether noise on the level weights of each mixer alone moves the output."""
    weights = [m for name, m in model.named_modules() if name.split(".")[-1].startswith("loglinear")]
    run = compiled(model)
    for each in weights:
        before, kept = run(x).detach().clone(), copy.deepcopy(each.state_dict())
        with torch.no_grad():
            for p in each.parameters():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
        if difference(run(x), before) < 1e-3:
            return False
        each.load_state_dict(kept)
    return bool(weights)


@pytest.mark.parametrize(
    ("functions", "mixers"),
    [
        ((bare, bare, bare), 3),
        ((gated, softmax, bare), 2),
    ],
)
def test_stacked(functions: tuple[Function, ...], mixers: int) -> None:
    """The level weights of each read the output of the one before."""
    model = nn.Sequential(*map(Written, functions))
    assert len(agreeing(model).converted) == mixers
    assert noise_moves_each(model, example())


def values_of_another(m: Written, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return m.out(mix(q.tanh(), k.sigmoid(), mix(q, k, v)))


def values_of_another_changed(m: Written, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The second reads the output as it was before the write."""
    o = mix(q, k, v)
    mixed = mix(q.tanh(), k.sigmoid(), o)
    o.neg_()
    return m.out(mixed + o)


def computed_again(m: Written, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What both read is computed twice."""
    first = mix(q.tanh(), k.exp(), v)
    return m.out(first.sin() + mix(q.tanh().flip(-1), k.exp(), first))


@pytest.mark.parametrize(
    ("function", "grads"), [(values_of_another, True), (values_of_another_changed, False), (computed_again, True)]
)
def test_the_output_is_an_operand(function: Function, grads: bool) -> None:
    report, model = same(function, grads=grads)
    assert len(report.converted) == 2
    with torch.set_grad_enabled(grads):
        assert noise_moves_each(model, example())
