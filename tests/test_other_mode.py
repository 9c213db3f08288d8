"""Converted in one mode, called in the other: the level weights act there, too, or the report says why not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import llcompile
from llcompile.errors import MissedLevelWeightsError
from tests.helpers.block import compiled, difference, inputs, perturb, weights_of

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Layer(nn.Module):
    """One projection for all operands; `rule(self, q, k, v)` mixes."""

    def __init__(self, rule: Callable[[Layer, Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.qkv, self.drop, self.rule = nn.Linear(8, 24), nn.Dropout(0.2), rule

    def forward(self, x: Tensor) -> Tensor:
        return self.rule(self, *self.qkv(x).chunk(3, -1))


def scores(q: Tensor, k: Tensor) -> Tensor:
    return torch.einsum("btd,bsd->bts", q, k).tril()


def plain(layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k) @ v


def dropped_output(layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return layer.drop(scores(q, k) @ v)


def dropped_values(layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k) @ F.dropout(v, 0.3, layer.training)


def no_dropout_after_all(layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout(scores(q, k), 0.0, layer.training) @ v


def dropped_scores(layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return layer.drop(scores(q, k)) @ v


def softmax_to_learn(layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores(q, k)
    return (weights.softmax(-1) if layer.training else weights) @ v


def softmax_to_serve(layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores(q, k)
    return (weights if layer.training else weights.softmax(-1)) @ v


def acts(model: nn.Module, layer: nn.Module) -> bool:
    run = compiled(model)
    torch.manual_seed(0)
    before = run(inputs())
    perturb(weights_of(layer))
    torch.manual_seed(0)
    after = run(inputs())
    grads = torch.autograd.grad(after.square().mean(), weights_of(layer))
    return difference(after, before) > 1e-3 and all(bool(g.abs().max() > 0) for g in grads)


@pytest.mark.parametrize("rule", [plain, dropped_output, dropped_values, no_dropout_after_all])
def test_what_is_a_mixer_in_both_modes(rule: Callable[..., Tensor]) -> None:
    """The controls: dropout beside the scores leaves a mixer, and it acts in training."""
    layer = Layer(rule)
    model = nn.Sequential(layer).eval()
    (converted,) = llcompile.convert(model, inputs()).converted
    assert not any("training" in note for note in converted.notes)
    assert acts(model.train(), layer)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("rule", [dropped_scores, softmax_to_learn])
def test_what_is_a_mixer_in_eval_only(rule: Callable[..., Tensor], nested: bool) -> None:
    """Its level weights could not learn: declined, and later compilations leave it as it is, in both modes."""
    layer = Layer(rule)
    model = nn.Sequential(nn.Identity(), layer).eval() if nested else layer.eval()
    report = llcompile.convert(model, inputs())
    (declined,) = report.declined
    assert not report.converted
    assert "in training it computes something else" in declined.reason
    assert declined.where.endswith(rule.__name__)
    assert not hasattr(layer, "loglinear")
    want = model(inputs())
    assert difference(compiled(model)(inputs()), want) < 1e-5
    assert not hasattr(layer, "loglinear")
    compiled(model.train())(inputs())
    assert not hasattr(layer, "loglinear")


def test_the_model_and_the_random_numbers_are_what_they_were() -> None:
    """The look in the other mode draws for its dropout and sets modes, and leaves neither behind."""
    model = nn.Sequential(Layer(dropped_scores), nn.Dropout(0.1), Layer(plain)).eval()
    model[1].train()
    torch.manual_seed(3)
    want = torch.rand(2)
    torch.manual_seed(3)
    llcompile.convert(model, inputs())
    assert torch.equal(torch.rand(2), want)
    assert [m.training for m in model] == [False, True, False]


def test_what_is_a_mixer_in_training_only() -> None:
    """It learns, so it is converted; the report and the call in eval say what happens there."""
    layer = Layer(softmax_to_serve)
    model = nn.Sequential(layer).train()
    (converted,) = llcompile.convert(model, inputs()).converted
    assert any("in eval it is not a mixer" in note and "softmax" in note for note in converted.notes)
    assert acts(model, layer)
    with pytest.raises(MissedLevelWeightsError, match=r"in eval mode.*softmax"):
        compiled(model.eval())(inputs())


def test_trained_level_weights_are_kept() -> None:
    """Converted again in eval: what has been trained is not taken away, and a note tells."""
    layer = Layer(dropped_scores)
    layer.drop.p = 0.0
    model = nn.Sequential(layer).eval()
    llcompile.convert(model, inputs())
    perturb(weights_of(layer))
    layer.drop.p = 0.2
    (converted,) = llcompile.convert(model, inputs()).converted
    assert any("in training it is not a mixer" in note for note in converted.notes)
    assert difference(compiled(model)(inputs()), plain(layer, *layer.qkv(inputs()).chunk(3, -1))) > 1e-3
    with pytest.raises(MissedLevelWeightsError, match="in training mode"):
        compiled(model.train())(inputs())


def test_nothing_is_looked_at_twice_where_no_code_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mixer that does not read `training` costs nothing more."""
    from llcompile.checks import other_mode

    looked: list[bool] = []
    run = other_mode._run
    monkeypatch.setattr(other_mode, "_run", lambda *args: (looked.append(True), run(*args))[1])
    llcompile.convert(nn.Sequential(Layer(plain), nn.Dropout(0.1)), inputs())
    assert not looked
    llcompile.convert(nn.Sequential(Layer(dropped_scores)).eval(), inputs())
    assert looked
