"""convert ends by running what will run: what is equal, what acts, and what costs a mixer its level weights."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import llcompile
from llcompile import driver
from llcompile.checks import runs
from llcompile.errors import CaptureError, StrictError
from llcompile.weights import attachment
from tests.helpers import small

EAGER = {"inner": "eager"}


class Mixer(nn.Module):
    """Linear attention; `after` does something to its output, which no proof of the part can see."""

    def __init__(self, after: Callable[[Mixer, Tensor], Tensor] = lambda m, o: o, width: int = 8) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.after(self, (self.q(x) @ self.k(x).mT).tril() @ self.v(x)))


class Two(nn.Module):
    """Two layers; `join` says what becomes of their outputs."""

    def __init__(self, join: Callable[[Two, Tensor, Tensor, Tensor], Any] = lambda m, x, a, b: x + a + b) -> None:
        super().__init__()
        self.first, self.second = Mixer(), Mixer()
        self.scale = nn.Parameter(torch.zeros(1))
        self.drop = nn.Dropout(0.3)
        self.join = join

    def forward(self, x: Tensor) -> Any:
        return self.join(self, x, self.first(x), self.second(x))


def inputs() -> Tensor:
    return torch.randn(2, 20, 8, generator=torch.Generator().manual_seed(3))


def owners(model: nn.Module) -> list[str]:
    names = {id(m): n for n, m in model.named_modules()}
    return [names[id(owner)] for owner, _, _ in attachment.attached(model)]


JOINS: dict[str, Callable[[Two, Tensor, Tensor, Tensor], Any]] = {
    "a sum": lambda m, x, a, b: x + a + b,
    "a tuple and a dict": lambda m, x, a, b: (a, {"b": b, "n": 3, "ids": a.argmax(-1)}),
    "behind a parameter that is zero": lambda m, x, a, b: x + m.scale * (a + b),
    "dropout": lambda m, x, a, b: m.drop(x + a) + b,
}


@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("training", [False, True])
def test_what_agrees_and_acts_is_certified(join: str, training: bool) -> None:
    model, x = Two(JOINS[join]).train(training), inputs()
    before = copy.deepcopy(model.state_dict())
    report = llcompile.convert(model, x)
    made = report.certificate
    assert made is not None
    assert report.verified
    assert made.error < 1e-5
    assert made.gradient_error is not None
    assert made.gradient_error < 1e-5
    assert made.acts == ("first", "second")
    assert made.dtype == "float32"
    assert owners(model) == ["first", "second"]
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert all(w.is_identity() for _, _, w in attachment.attached(model))
    assert all(p.grad is None for p in model.parameters())
    assert "verified on the example inputs" in str(report)
    assert "2 mixers act" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["certificate"]["acts"] == ["first", "second"]


def _detached(m: Two, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return x + a + b.detach()


def _unused(m: Two, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return x + a


@pytest.mark.parametrize(("join", "reason"), [(_detached, "no gradient"), (_unused, "does not change")])
def test_a_mixer_that_does_not_act_is_declined(join: Any, reason: str) -> None:
    """The other one stays; a later compiled call leaves the declined one alone and warns of nothing."""
    model, x = Two(join), inputs()
    want = model(x).detach()
    report = llcompile.convert(model, x)
    assert report.certificate is not None
    assert report.certificate.acts == ("first",)
    assert [c.module for c in report.converted] == ["first"]
    assert [d.module for d in report.declined] == ["second"]
    assert reason in report.declined[0].reason
    assert owners(model) == ["first"]
    assert torch.allclose(torch.compile(model, backend="loglinear", options=EAGER)(x), want, atol=1e-5)
    assert owners(model) == ["first"]


def _wrong_rewrite(monkeypatch: pytest.MonkeyPatch, marked: Callable[[Any], bool], factor: float = 1.01) -> None:
    """Stands for a fault of a pass: what it writes for some mixers is a little off."""
    from llcompile.passes import rewrite
    from llcompile.passes.candidate import GraphCandidate

    write = rewrite._WRITERS[GraphCandidate]

    def off(session: Any, candidate: Any, held: Any) -> None:
        write(session, candidate, held)
        if session.settings.compiles and marked(candidate):
            last = candidate.written[-1]
            with session.graph.inserting_after(last):
                scaled = session.graph.call_function(torch.mul, (last, factor))
            scaled.meta = dict(last.meta)
            last.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)

    monkeypatch.setitem(rewrite._WRITERS, GraphCandidate, off)


def test_a_wrong_rewrite_costs_the_mixer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the passes believe: the run at the end says that the output would change, and which mixers do it."""
    model, x = Two(), inputs()
    twin, want = copy.deepcopy(model), model(x).detach()
    _wrong_rewrite(monkeypatch, lambda candidate: candidate.owner is model.second)
    report = llcompile.convert(model, x)
    # Both stand in the same line of one class, so that they are one to the search.
    assert {d.module for d in report.declined} == {"first", "second"}
    assert all("would change by" in d.reason for d in report.declined)
    assert owners(model) == []
    assert torch.allclose(torch.compile(model, backend="loglinear", options=EAGER)(x), want, atol=1e-5)
    monkeypatch.undo()
    control = llcompile.convert(twin, x)
    assert control.certificate is not None
    assert control.certificate.acts == ("first", "second")
    assert [c.module for c in llcompile.convert(model, x).converted] == ["first", "second"]


class Other(Mixer):
    """Another class, which the search tells apart."""


class Apart(Two):
    """Two mixers of two classes."""

    def __init__(self) -> None:
        super().__init__()
        self.second = Other()


def test_the_search_blames_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is tried alone: the one that makes the difference is declined, and the other one is certified without it."""
    model, x = Apart(), inputs()
    want = model(x).detach()
    _wrong_rewrite(monkeypatch, lambda candidate: candidate.owner is model.second)
    report = llcompile.convert(model, x)
    assert [d.module for d in report.declined] == ["second"]
    assert "would change by" in report.declined[0].reason
    assert [c.module for c in report.converted] == ["first"]
    assert report.certificate is not None
    assert report.certificate.acts == ("first",)
    assert report.certificate.error < 1e-5
    assert owners(model) == ["first"]
    # Nor is it rewritten later: the fault is still there.
    assert torch.allclose(torch.compile(model, backend="loglinear", options=EAGER)(x), want, atol=1e-5)


class Near(Two):
    """Gives the small difference between its sum and one that is near it, so that rounding is `1 / apart` as large."""

    near: Tensor

    def __init__(self, apart: float) -> None:
        super().__init__(lambda m, x, a, b: x + a + b - m.near)
        self.register_buffer("near", torch.zeros(2, 20, 8))
        with torch.no_grad():
            self.near.copy_((1 - apart) * self(inputs()))


@pytest.mark.parametrize("factor", [1 + 2e-3, 1 + 5e-4])
def test_amplified_rounding_hides_no_wrong_rewrite(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The room for rounding is that of rounding at the mixer, however much the model makes of it."""
    model, x = Near(3e-4), inputs()
    twin = copy.deepcopy(model)
    _wrong_rewrite(monkeypatch, lambda candidate: True, factor)
    report = llcompile.convert(model, x)
    assert {d.module for d in report.declined} == {"first", "second"}
    assert all("would change by" in d.reason for d in report.declined)
    assert owners(model) == []
    monkeypatch.undo()
    control = llcompile.convert(twin, x)
    assert control.verified
    assert len(control.converted) == 2


def test_what_makes_noise_of_rounding_is_not_called_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    """No comparison tells such a rewrite from rounding: nothing is declined for it, and nothing certified."""
    _wrong_rewrite(monkeypatch, lambda candidate: True, 1 + 1e-6)
    model = Two(lambda m, x, a, b: torch.sin(1e8 * (x + a + b)))
    report = llcompile.convert(model, inputs())
    assert not report.verified
    assert "rounding at the mixers alone" in report.unverified
    assert len(report.converted) == 2


STATEMENTS: dict[str, Callable[[Tensor], Any]] = {
    "method": lambda h: h.mul_(0.5),
    "a view": lambda h: h[..., :3].add_(1.0),
    "a token": lambda h: h[:, 2].zero_(),
    "functional": lambda h: nn.functional.relu(h, inplace=True),
}


class Stack(nn.Module):
    """Mixers one behind the other, with a statement in place on what the first gives and the second reads."""

    def __init__(self, statement: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layers, self.statement = nn.ModuleList([Mixer(), Mixer()]), statement

    def forward(self, x: Tensor) -> Tensor:
        h = self.layers[0](x)
        self.statement(h)
        return h + self.layers[1](h)


@pytest.mark.parametrize("name", STATEMENTS)
def test_a_statement_in_place_between_two_mixers(name: str) -> None:
    model, x = Stack(STATEMENTS[name]), inputs()
    control, without = copy.deepcopy(model), copy.deepcopy(model)
    without.statement = lambda h: h
    assert not torch.allclose(without(x), control(x), atol=1e-2), "the statement has no part in it"
    report = llcompile.convert(model, x)
    assert [c.module for c in report.converted] == ["layers.0", "layers.1"]
    assert report.verified
    run = torch.compile(model, backend="loglinear", options=EAGER)
    assert torch.allclose(run(x), control(x), atol=1e-5)
    run(x).square().sum().backward()
    control(x).square().sum().backward()
    ours = dict(model.named_parameters())
    for parameter, own in control.named_parameters():
        grad = ours[parameter].grad
        assert own.grad is not None
        assert grad is not None
        assert small.difference(grad, own.grad) < 1e-4, parameter
    small.perturb(model.layers[1])
    assert not torch.allclose(run(x), control(x), atol=1e-3)


def test_strict_counts_what_the_run_has_declined() -> None:
    model = Two(_unused)
    with pytest.raises(StrictError, match="second"):
        llcompile.convert(model, inputs(), options={"strict": True})
    assert owners(model) == []


def test_it_can_be_left_out() -> None:
    model = Two(_unused)
    report = llcompile.convert(model, inputs(), verify=False)
    assert not report.verified
    assert report.certificate is None
    assert "verify=False" in report.unverified
    assert "not verified: convert was called with verify=False" in str(report)
    assert report.to_dict()["unverified"] == report.unverified
    assert owners(model) == ["first", "second"]


def test_without_gradients() -> None:
    """In the caller's grad mode: outputs are compared, noise must move them, and nothing is said of gradients."""
    model, x = Two(_unused), inputs()
    with torch.no_grad():
        report = llcompile.convert(model, x)
    assert report.certificate is not None
    assert report.certificate.gradient_error is None
    assert report.certificate.acts == ("first",)


def test_frozen_weights() -> None:
    model = Two().requires_grad_(False)
    report = llcompile.convert(model, inputs())
    assert report.certificate is not None
    assert report.certificate.gradient_error is None
    assert report.certificate.acts == ("first", "second")


@pytest.mark.parametrize(("dtype", "budget"), [(torch.float64, 1e-8), (torch.bfloat16, 5e-2)])
def test_the_budget_is_that_of_the_dtype(dtype: torch.dtype, budget: float) -> None:
    report = llcompile.convert(Two().to(dtype), inputs().to(dtype))
    assert report.certificate is not None
    assert report.certificate.dtype == str(dtype).removeprefix("torch.")
    assert report.certificate.error <= budget


class Mixed(Two):
    """Parameters and output in float32, and all between them under autocast."""

    def forward(self, x: Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(x)


@pytest.mark.parametrize("wrong", [False, True])
def test_under_autocast_the_budget_is_that_of_the_dtype_inside(wrong: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if wrong:
        _wrong_rewrite(monkeypatch, lambda candidate: True, factor=3.0)
    report = llcompile.convert(Mixed(), inputs())
    assert len(report.converted) == (0 if wrong else 2), str(report)
    if not wrong:
        assert report.certificate is not None
        assert report.certificate.dtype == "bfloat16"
        assert report.certificate.error <= 5e-2
        assert llcompile.convert(Two(), inputs()).certificate.dtype == "float32"  # type: ignore[union-attr]


def test_a_meta_model_has_no_values() -> None:
    with torch.device("meta"):
        model = Two()
    report = llcompile.convert(model, inputs().to("meta"))
    assert report.certificate is None
    assert "meta" in report.unverified
    assert len(report.converted) == 2


def test_a_model_of_chance() -> None:
    """No two of its runs agree, with or without us: nothing is verified, and no mixer is blamed."""
    model = Two(lambda m, x, a, b: (a + b) * (1 + os.urandom(1)[0]))
    report = llcompile.convert(model, inputs())
    assert not report.verified
    assert "its own output" in report.unverified or "from run to run" in report.unverified
    assert owners(model) == ["first", "second"]


def test_a_failure_of_the_check_itself_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("the check is at fault")

    monkeypatch.setattr(runs, "difference", broken)
    model = Two()
    report = llcompile.convert(model, inputs())
    assert report.certificate is None
    assert "the check is at fault" in report.unverified
    assert "not verified: " in str(report)
    assert owners(model) == ["first", "second"]


def test_trained_level_weights_stay() -> None:
    """A second convert looks at them as 1 and puts them back bit for bit."""
    model, x = Two(), inputs()
    llcompile.convert(model, x)
    small.perturb(model)
    before = copy.deepcopy(model.state_dict())
    report = llcompile.convert(model, x)
    assert report.certificate is not None
    assert report.certificate.error < 1e-5
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_inputs_are_not_blamed_for_what_the_look_does(monkeypatch: pytest.MonkeyPatch) -> None:

    def broken(session: Any) -> None:
        raise ZeroDivisionError("in a rule")

    monkeypatch.setattr(driver, "look", broken)
    with pytest.raises(CaptureError, match=r"runs on the example inputs.*in a rule"):
        llcompile.convert(Two(), inputs())
