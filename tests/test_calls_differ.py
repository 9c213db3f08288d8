"""One converted model in calls that differ: modes, states, breaks, lengths, hand-written gradients, shared inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import llcompile
from llcompile.backend import last_report
from llcompile.errors import MissedLevelWeightsError
from llcompile.passes.names import _definition, _ends
from tests.helpers.small import difference

pytestmark = [pytest.mark.usefixtures("fresh_dynamo"), pytest.mark.filterwarnings("ignore::UserWarning")]
WIDTH = 12


class Layer(nn.Module):
    """Linear attention with two heads over a fused projection; `rule` is its forward."""

    def __init__(self, rule: Callable[..., Any]) -> None:
        super().__init__()
        self.rule = rule
        self.qkv, self.other = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3 * WIDTH)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.unflatten(-1, (2, 6)).transpose(1, 2) for t in x.chunk(3, -1))  # [B, H, T, K]

    def forward(self, x: Tensor, *rest: Any) -> Any:
        return self.rule(self, x, *rest)


def mixed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = (torch.einsum("bhik,bhjk->bhij", q, k).tril() @ v).transpose(1, 2)
    return out.flatten(2)


def data(length: int = 20) -> Tensor:
    return torch.randn(3, length, WIDTH, generator=torch.Generator().manual_seed(2))


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="loglinear", options={"inner": "eager"})


def levels(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if "loglinear" in name}


def perturb(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in levels(model).values():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))


def movers(model: nn.Module, run: Callable[[], Tensor]) -> set[str]:
    """The level weights that move what is computed."""
    found = set()
    for name, p in levels(model).items():
        before, kept = run().detach().clone(), p.detach().clone()
        with torch.no_grad():
            p.add_(0.3)
        if difference(run().detach(), before) > 1e-3:
            found.add(name.rpartition(".")[0])
        with torch.no_grad():
            p.copy_(kept)
    return found


# Names: two mixers, the first of which runs in some calls only.
def two_lines(m: Any, x: Tensor) -> Tensor:
    if m.training:
        x = x + mixed(*m.split(m.other(x)))
    return x + mixed(*m.split(m.qkv(x)))


def one_line(m: Any, x: Tensor) -> Tensor:
    for projection in [m.other, m.qkv] if m.training else [m.qkv]:
        x = x + mixed(*m.split(projection(x)))
    return x


@pytest.mark.parametrize("rule", [two_lines, one_line])
@pytest.mark.parametrize("first", [True, False])
def test_level_weights_stay_with_their_mixer(rule: Callable[..., Any], first: bool) -> None:
    model, x = Layer(rule).train(first), data()
    assert len(llcompile.convert(model, x, verify=False).converted) == 1 + first
    run, acting = compiled(model), {}
    for mode in (True, False):
        model.train(mode)
        run(x)
        acting[mode] = movers(model, lambda: run(x))
    (main,) = acting[False]
    assert acting[True] == {"loglinear", "loglinear_2"}
    model.train()
    with torch.no_grad():
        model.qkv.weight[2 * WIDTH :].zero_()  # the main mixer writes nothing: its level weights move nothing
        model.qkv.bias[2 * WIDTH :].zero_()
    assert movers(model, lambda: run(x)) == {"loglinear", "loglinear_2"} - {main}


def test_a_line_is_counted_within_its_function(tmp_path: Path) -> None:
    source = "class A:\n    def forward(self):\n        def inner():\n            return 1\n        return inner()\n"
    (tmp_path / "one.py").write_text(source)
    (tmp_path / "two.py").write_text("# a comment\n\nimport os\n" + source)
    assert _definition(str(tmp_path / "one.py"), 4, "inner") == ("A.forward.inner", 1)
    assert _definition(str(tmp_path / "two.py"), 7, "inner") == ("A.forward.inner", 1)
    assert _definition(str(tmp_path / "two.py"), 8, "forward") == ("A.forward", 3)
    assert _ends(("a", "b", "c"), ("b", "c"))
    assert not _ends(("a", "b"), ("a",))


# States that are handed out, and other readers of keys and values.
def with_state(m: Any, x: Tensor, state: Tensor | None = None) -> Any:
    q, k, v = m.split(m.qkv(x))
    out = mixed(q, k, v)
    after = torch.einsum("bhtk,bhtv->bhkv", k, v)
    if state is not None:
        out = out + torch.einsum("bhtk,bhkv->bhtv", q, state).transpose(1, 2).flatten(2)
        after = after + state
    return {"out": out, "state": after}


def with_maximum(m: Any, x: Tensor) -> Any:
    q, k, v = m.split(m.qkv(x))
    return {"out": mixed(q, k, v) + v.cummax(2).values.transpose(1, 2).flatten(2), "state": v.amax(2)}


@pytest.mark.parametrize("rule", [with_state, with_maximum])
def test_a_state_that_is_handed_out_leaves_the_levels(rule: Callable[..., Any]) -> None:
    model, x = Layer(rule), data()
    plain = copy.deepcopy(model)(x)
    assert len(llcompile.convert(model.eval(), x, verify=False).converted) == 1
    perturb(model)
    run = compiled(model)
    with torch.no_grad():
        evaluated = run(x)
    assert difference(evaluated["out"], plain["out"]) > 1e-3
    assert difference(evaluated["state"], plain["state"]) < 1e-5
    trained = compiled(model.train())(x)
    assert difference(trained["out"], evaluated["out"]) < 1e-5
    trained["out"].square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in levels(model).values())


def test_a_linear_state_that_comes_back_in_is_not_read_in_silence() -> None:
    model, x = Layer(with_state).eval(), data()
    llcompile.convert(model, x, verify=False)
    perturb(model)
    run = compiled(model)
    with torch.no_grad():
        state = run(x)["state"]
        with pytest.raises(MissedLevelWeightsError, match="it received a state without levels"):
            run(x, state)


# Breaks between a projection and its mixer.
def test_level_weights_read_the_same_input_behind_a_break() -> None:
    printed: list[float] = []

    def plain(m: Any, x: Tensor) -> Tensor:
        return mixed(*m.split(m.qkv(x)))

    def hook(module: nn.Module, args: Any, out: Tensor) -> None:
        printed.append(out.sum().item())

    x, outputs, shapes = data(), [], []
    start = Layer(plain)
    for hooked in (False, True):
        torch._dynamo.reset()
        model = nn.Sequential(nn.Identity(), copy.deepcopy(start))
        if hooked:
            model[1].qkv.register_forward_hook(hook)
        llcompile.convert(model, x, verify=False)
        shapes.append({name: p.shape for name, p in levels(model).items()})
        perturb(model)
        run = compiled(model)
        outputs.append(run(x))
        assert movers(model, lambda run=run: run(x)) == {"1.loglinear"}
        assert model[1].loglinear.owner_input is None
    assert printed
    assert shapes[0] == shapes[1]
    assert difference(outputs[1].detach(), outputs[0].detach()) < 1e-5
    assert difference(outputs[0].detach(), start(x).detach()) > 1e-3


def test_the_part_behind_a_break_may_ask_its_input_for_its_dtype() -> None:
    """Dynamo has that input, and takes it out of the graph again: the level weights read it under the name it had."""

    def asking(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.split(m.qkv(x))
        if q.abs().max().item() > 1e9:
            v = 0 * v
        return mixed(q, k, v) + torch.zeros((), dtype=x.dtype) * m.qkv.weight[0, 0]

    x, model = data(), Layer(asking)
    before = model(x)
    report = llcompile.convert(model, x)
    assert len(report.converted) == 1, str(report)
    run = compiled(model)
    assert difference(run(x), before) < 1e-5
    assert movers(model, lambda: run(x)) == {"loglinear"}


# Short sequences.
@pytest.mark.parametrize("lengths", [(2, 33), (20, 2, 3, 33)])
def test_two_tokens_have_levels(lengths: tuple[int, ...]) -> None:
    model, x = Layer(lambda m, x: mixed(*m.split(m.qkv(x)))), data(33)
    llcompile.convert(model, x[:, :20], verify=False)
    perturb(model)
    run = compiled(model)
    with torch.no_grad():
        outputs = {n: run(x[:, :n].contiguous()) for n in lengths}
        whole = outputs[33]
        assert difference(whole, model(x)) > 1e-3
        for n, out in outputs.items():
            assert difference(out, whole[:, :n]) < 1e-5


def test_two_tokens_that_see_each_other_are_no_mixer() -> None:
    """The control: without the mask, two tokens are not causal."""

    def both_ways(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.split(m.qkv(x))
        return (q @ k.mT @ v).transpose(1, 2).flatten(2)

    assert not llcompile.convert(Layer(both_ways), data(2), verify=False).converted


def test_what_convert_declined_is_no_mixer_in_another_call() -> None:
    """A short sequence looks like a mixer; its level weights would be missed in every longer one."""

    def stops(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.split(m.qkv(x))
        scores = (q @ k.mT).tril()
        scores = (scores + scores.detach()) / 2 if x.shape[1] > 10 else scores
        return (scores @ v).transpose(1, 2).flatten(2)

    model, x = Layer(stops), data(33)
    report = llcompile.convert(model, x)
    assert not report.converted
    assert [record.code for record in report.declined] == ["gradient-stopped"]
    run = compiled(model)
    for length in (6, 33, 9):
        assert difference(run(x[:, :length]), model(x[:, :length])) < 1e-6
    assert not levels(model)
    assert llcompile.convert(model, x[:, :9]).converted, "another conversion looks anew"


# Gradients by hand.
def _function(factor: float) -> Any:
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            ctx.save_for_backward(q, k, v)
            return torch.einsum("bhik,bhjk->bhij", q, k).tril() @ v

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
            q, k, v = ctx.saved_tensors
            scores = (grad @ v.transpose(-1, -2)).tril()
            written = torch.einsum("bhik,bhjk->bhij", q, k).tril()
            return scores @ k, factor * (scores.transpose(-1, -2) @ q), written.transpose(-1, -2) @ grad

    return Product


def test_a_function_with_its_own_gradient_is_one_model_with_and_without() -> None:
    function = _function(1.0)
    model = Layer(lambda m, x: function.apply(*m.split(m.qkv(x))).transpose(1, 2).flatten(2))
    x = data()
    assert len(llcompile.convert(model, x, verify=False).converted) == 1
    perturb(model)
    run = compiled(model)
    with torch.no_grad():
        without = run(x)
    assert difference(run(x).detach(), without) < 1e-5
    assert movers(model, lambda: run(x)) == {"loglinear"}


def test_a_function_that_scales_a_gradient_is_left() -> None:
    function = _function(0.5)
    model = Layer(lambda m, x: function.apply(*m.split(m.qkv(x))).transpose(1, 2).flatten(2))
    control, x = copy.deepcopy(model), data()
    compiled(model)(x).square().mean().backward()
    control(x).square().mean().backward()
    assert not last_report().converted
    assert "backward is not the gradient" in last_report().declined[0].reason
    assert model.qkv.weight.grad is not None
    assert difference(model.qkv.weight.grad, control.qkv.weight.grad) < 1e-5


# Inputs that coincide.
def test_inputs_that_were_one_tensor_decide_nothing() -> None:
    def crossed(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        projected = [m.qkv(t).chunk(3, -1)[i] for i, t in enumerate((q, k, v))]
        return mixed(*(t.unflatten(-1, (2, 6)).transpose(1, 2) for t in projected))

    x, found = data(), []
    for inputs in ((x, x, x), (x, x.clone(), 2 * x)):
        torch._dynamo.reset()
        model = Layer(crossed)
        llcompile.convert(model, *inputs, verify=False)
        found.append({name: p.shape for name, p in levels(model).items()})
        run = compiled(model)
        other = (x, x.flip(0), 3 * x)
        for given in ((x, x, x), other):
            assert difference(run(*given).detach(), model(*given).detach()) < 1e-5
        assert movers(model, lambda run=run, other=other: run(*other)) == {"loglinear"}
    assert found[0] == found[1]


def test_equal_layers_around_breaks_are_all_seen() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer(lambda m, x: mixed(*m.split(m.qkv(x)))) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
                torch._dynamo.graph_break()
            return x

    model, x = Stack(), data()
    assert [c.module for c in llcompile.convert(model, x, verify=False).converted] == [f"layers.{i}" for i in range(3)]
    run = compiled(model)
    assert movers(model, lambda: run(x)) == {f"layers.{i}.loglinear" for i in range(3)}


class Logged(nn.Module):
    """Breaks its graph behind the projection, as a print does."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        torch._dynamo.graph_break()
        return (q @ k.mT).tril() @ v


@pytest.mark.parametrize("compiled_first", [False, True])
def test_a_model_that_is_compiled_already(compiled_first: bool) -> None:
    """`model.compile()` before `convert` hides nothing from it, and is there afterwards."""
    model, x = nn.Sequential(Logged()), torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(1))
    if compiled_first:
        model.compile(backend="loglinear", options={"inner": "eager"})
    call = model._compiled_call_impl
    report = llcompile.convert(model, x, verify=False)
    assert len(report.converted) + len(report.declined) == 1, report
    assert model._compiled_call_impl is call


class Dropping(nn.Module):
    """A chunk loop with dropout behind it: with dynamic=True the rate is an input of the graph."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.qkv, self.drop = nn.Linear(WIDTH, 3 * WIDTH), nn.Dropout(rate)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 6)) for t in self.qkv(x).chunk(3, -1))  # [B, T, H, K]
        state, outs = x.new_zeros(len(x), 2, 6, 6), []
        for part in range(0, x.shape[1], 4):
            here = [t[:, part : part + 4] for t in (q, k, v)]
            scores = torch.einsum("bthk,bshk->bhts", here[0], here[1]).tril()
            outs.append(torch.einsum("bhts,bshv->bthv", scores, here[2]))
            outs[-1] = outs[-1] + torch.einsum("bthk,bhkv->bthv", here[0], state)
            state = state + torch.einsum("bthk,bthv->bhkv", here[1], here[2])
        return x + self.drop(torch.cat(outs, 1).flatten(2)) / 8


@pytest.mark.parametrize("dynamic", [False, True])
def test_dropout_hides_no_layer_behind_it(dynamic: bool) -> None:
    """Both layers act in training, with the dropout that the model has by itself; the control is a static graph."""
    x = data(6)[:2]  # as many tokens as a value has channels, as many rows as there are heads
    model = nn.Sequential(Dropping(0.2), Dropping(0.2)).train()
    torch.manual_seed(0)
    want = model(x)
    llcompile.convert(model, x, verify=False)
    run = torch.compile(model, backend="loglinear", options={"inner": "eager"}, dynamic=dynamic)
    torch.manual_seed(0)
    got = run(x)
    assert difference(got, want) < 1e-5
    got.square().mean().backward()
    weights = levels(model)
    assert {name.split(".")[0] for name in weights} == {"0", "1"}
    assert all(p.grad is not None and bool(p.grad.any()) for p in weights.values())
    perturb(model)
    torch.manual_seed(0)
    assert difference(run(x), want) > 1e-3
