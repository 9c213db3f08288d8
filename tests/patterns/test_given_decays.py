"""Decays that no module owns: arguments of the call, and tensors of the program around it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import llcompile
from tests.helpers.small import difference, perturb

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

HEADS, WIDTH, LENGTH = 2, 8, 10
KEEP = torch.tensor([0.9, 0.7])


class Loop(nn.Module):
    """Token by token; each head forgets by `keep` [H]."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).unbind(2)
        state, read = x.new_zeros(x.shape[0], HEADS, 4, 4), []
        for t in range(x.shape[1]):
            state = keep.view(1, -1, 1, 1) * state + k[:, t, :, :, None] * v[:, t, :, None]
            read.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
        return torch.stack(read, 1).flatten(2)


class OfGlobal(Loop):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, KEEP)


def tokens(seed: int = 0) -> Tensor:
    return torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(seed))


def test_argument() -> None:
    """Any decay in (0, 1] may be given, and no other."""
    model, keep = Loop(), torch.tensor([0.5, 0.95])
    report = llcompile.convert(model, tokens(), keep)
    assert [(c.decay, c.correction) for c in report.converted] == [("scalar", "none")], report
    assert "its decay is an argument: every call checks that it is in (0, 1]" in str(report)
    run = torch.compile(model, backend="loglinear", options={"inner": "eager"})
    for given in (keep, torch.tensor([1.0, 0.3])):
        assert difference(run(tokens(1), given), model(tokens(1), given)) < 1e-5
    with pytest.raises(RuntimeError, match="its decay must lie in"):
        run(tokens(1), torch.tensor([1.1, 0.3]))
    before = run(tokens(1), keep).detach()
    perturb(model)
    assert difference(run(tokens(1), keep), before) > 1e-3


def test_argument_out_of_range() -> None:
    (declined,) = llcompile.inspect(Loop(), tokens(), torch.tensor([1.25, 0.5])).declined
    assert declined.code == "decay-out-of-range"
    assert "0.5 to 1.25" in declined.reason


def test_numbers_of_a_global_are_guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another tensor in its place, and other numbers in the same tensor."""
    model = OfGlobal()
    assert len(llcompile.convert(model, tokens()).converted) == 1
    run = torch.compile(model, backend="loglinear", options={"inner": "eager"})
    outputs = [run(tokens(1)).detach()]
    monkeypatch.setitem(globals(), "KEEP", torch.tensor([0.4, 0.6]))
    outputs.append(run(tokens(1)).detach())
    assert difference(outputs[1], model(tokens(1))) < 1e-5
    KEEP.mul_(0.5)
    outputs.append(run(tokens(1)).detach())
    assert difference(outputs[2], model(tokens(1))) < 1e-5
    assert difference(outputs[0], outputs[1]) > 1e-3
    assert difference(outputs[1], outputs[2]) > 1e-3
