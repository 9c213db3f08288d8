"""Operands of a mixer that a statement has written to through a view, and that are then read as they are."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import llcompile

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

Operands = tuple[Tensor, Tensor, Tensor]


class Mixer(nn.Module):
    """Linear attention over [B, T, H, K] as it comes from the projection; `write` changes an operand first."""

    def __init__(self, write: Callable[[Tensor, Tensor, Tensor], None], late: bool = False) -> None:
        super().__init__()
        self.qkv, self.out, self.write, self.late = nn.Linear(8, 24), nn.Linear(8, 8), write, late

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (2, 4)).clone() for y in self.qkv(x).chunk(3, -1))
        self.write(q, k, v)
        scores = torch.einsum("bthk,bshk->bhts", q, k).tril()
        o = torch.einsum("bhts,bshv->bthv", scores, v)
        if self.late:
            v[:, 1:] *= 3.0
        return self.out((o + v).flatten(-2))


def half(q: Tensor, k: Tensor, v: Tensor) -> None:
    part = k[..., 2:]
    part *= 0.5


def first_value(q: Tensor, k: Tensor, v: Tensor) -> None:
    v[:, 0] = 0.0


def channel(q: Tensor, k: Tensor, v: Tensor) -> None:
    q[..., 1].fill_(1.0)


def under_no_grad(q: Tensor, k: Tensor, v: Tensor) -> None:
    with torch.no_grad():
        v.data[..., 0] = 2.0
        v.square()  # a reader here has no gradient, and the mixer has


def nothing(q: Tensor, k: Tensor, v: Tensor) -> None:
    pass


def results(run: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output, and the gradients of all parameters that are not level weights."""
    model.zero_grad()
    o = run(x)
    o.square().sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if "loglinear" not in n}
    return {"output": o.detach(), **{n: g for n, g in grads.items() if g is not None}}


@pytest.mark.parametrize("late", [False, True], ids=["", "written again behind"])
@pytest.mark.parametrize("write", [half, first_value, channel, under_no_grad])
def test_the_operand_is_what_the_write_has_left(write: Callable[..., None], late: bool) -> None:
    model = Mixer(write, late)
    control, other = copy.deepcopy(model), copy.deepcopy(model)
    other.write = nothing
    x = torch.randn(2, 9, 8)
    report = llcompile.convert(model, x)
    assert len(report.converted) == 1, str(report)
    run = torch.compile(model, backend="loglinear", options={"inner": "eager"})
    for tokens in (x, torch.randn(2, 13, 8)):
        got, want = results(run, model, tokens), results(control, control, tokens)
        assert got.keys() == want.keys()
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-4, msg=name)
    assert (control(x) - other(x)).abs().max() > 1e-2, "the write does nothing: the test shows nothing"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) if "loglinear" in name else 0.0)
    assert (run(x) - control(x)).abs().max() > 1e-3
