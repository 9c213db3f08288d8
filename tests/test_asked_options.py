"""Options that contradict the level weights that a model has are errors; what was not said contradicts nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import llcompile
from llcompile.errors import LevelWeightsError
from llcompile.options import Options

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Block(nn.Module):
    """Retention with one fixed decay."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(12, 12) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        at = torch.arange(x.shape[1])
        decay = (0.9 ** (at[:, None] - at).clamp(min=0)).tril()
        return x + (self.q(x) @ self.k(x).mT * decay) @ self.v(x) / 4


def converted(**options: Any) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = nn.Sequential(Block(), Block()), torch.randn(2, 23, 12)
    assert len(llcompile.convert(model, x, options=options, verify=False).converted) == 2
    return model, x


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="loglinear", options={"inner": "eager", **options})


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in model.state_dict().items()}


CONTRADICTIONS = [
    ({}, {"levels": 9}, "levels=9"),
    ({"levels": 9}, {"levels": 17}, "levels=17"),  # the default, but said
    ({}, {"level_weights": "static"}, "level_weights='static'"),
    ({"level_weights": "static"}, {"level_weights": "linear"}, "level_weights='linear'"),
    ({"level_weights": "mlp"}, {"level_weights": "paper", "levels": 5}, "level_weights='paper' and levels=5"),
]


HOW = ("compile", "convert", "compile", "inspect", "convert")


@pytest.mark.parametrize(
    ("how", "first", "later", "said"),
    [(how, *case) for how, case in zip(HOW, CONTRADICTIONS, strict=True)],
)
def test_a_contradiction_is_an_error(how: str, first: dict[str, Any], later: dict[str, Any], said: str) -> None:
    model, x = converted(**first)
    before, want = shapes(model), compiled(model)(x).detach()
    ask = {
        "compile": lambda: compiled(model, **later)(x),
        "convert": lambda: llcompile.convert(model, x, options=later),
        "inspect": lambda: llcompile.inspect(model, x, options=later),
    }
    with pytest.raises(LevelWeightsError) as told:
        ask[how]()
    assert f"options set {said}, but 0.loglinear already has level weights" in str(told.value)
    assert "llcompile.revert(model)" in str(told.value)
    assert shapes(model) == before
    torch.testing.assert_close(compiled(model)(x), want)  # and it runs on


@pytest.mark.parametrize(
    "first",
    [
        {},
        pytest.param({"levels": 9}, marks=pytest.mark.slow),
        pytest.param({"level_weights": "static"}, marks=pytest.mark.slow),
        pytest.param({"level_weights": "mlp", "levels": 4}, marks=pytest.mark.slow),
    ],
)
def test_what_is_not_said_or_repeated_contradicts_nothing(first: dict[str, Any]) -> None:
    model, x = converted(**first)
    before = shapes(model)
    for later in ({}, first, {"strict": True}, *({name: value} for name, value in first.items())):
        compiled(model, **later)(x)
        llcompile.convert(model, x, options=later, verify=False)
    assert shapes(model) == before


def test_none_switches_level_weights_off_whatever_they_are() -> None:
    model, x = converted(level_weights="mlp")
    torch.testing.assert_close(compiled(model, level_weights="none")(x), model(x), rtol=1e-4, atol=1e-4)


def test_level_weights_put_there_by_hand_are_asked_about_too() -> None:
    """An imported checkpoint's, say: they keep their kind where nothing is asked for."""
    model, x = converted(levels=9)
    model[0].loglinear = llcompile.LevelWeights("paper", 1, 15, 12)
    compiled(model)(x)
    with pytest.raises(LevelWeightsError, match=r"0\.loglinear already has level weights of kind 'paper' with 15"):
        compiled(model, levels=9)(x)


def test_options_know_what_was_said() -> None:
    assert Options.parse({"levels": 17, "strict": True}).asked == {"levels": 17}
    assert Options.parse({}).asked == Options.parse(None).asked == Options().asked == {}
    assert Options.parse({"levels": 17}) == Options.parse({})  # the same options, said or not
