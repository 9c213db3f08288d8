"""The kind of level weights that nobody asked for: linear, or mlp where linear is large; and what the report says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import llcompile
from llcompile import LevelWeights
from llcompile.errors import CheckpointError
from llcompile.report import Certificate, Converted, Report
from llcompile.weights.default_kind import LARGEST, choose, parameters
from llcompile.weights.level_kinds import KINDS, Sizes

HEADS, LEVELS, WIDTH = 12, 17, 4904  # 12 * 17 * 4905 = 1,000,620


class Wide(nn.Module):
    """Few small heads on a wide input: linear level weights have just more than a million parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * HEADS * 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (HEADS, 4)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return ((q @ k.mT).tril() @ v).transpose(1, 2).flatten(2)


def looked_at(options: dict[str, Any] | None = None) -> tuple[nn.Module, Report]:
    torch.manual_seed(0)
    model = Wide()
    return model, llcompile.convert(model, torch.randn(1, 9, WIDTH), options=options, verify=False)


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="loglinear", options={"inner": "eager"})


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_counted_as_they_are_made(kind: str) -> None:
    made = LevelWeights(kind, 3, 5, 8 if KINDS[kind].needs_input else None)
    assert parameters(kind, made.sizes) == sum(p.numel() for p in made.parameters())


def test_the_bound() -> None:
    assert choose(HEADS, LEVELS, WIDTH).kind == "mlp"
    assert choose(11, LEVELS, WIDTH).kind == "linear"
    assert parameters("linear", Sizes(11, LEVELS, WIDTH)) <= LARGEST < parameters("linear", Sizes(12, LEVELS, WIDTH))
    assert not choose(11, LEVELS, WIDTH).remark
    assert choose(2, 17, 60_000).kind == "linear"  # where a hidden layer would be larger still


@pytest.mark.usefixtures("fresh_dynamo")
class TestConverted:
    """A mixer above the bound, through convert."""

    def test_it_is_mlp_and_acts_and_the_report_says_so(self) -> None:
        model, report = looked_at()
        own, new = model.qkv.weight.numel(), sum(p.numel() for p in model.loglinear.parameters())
        assert [record.level_weights for record in report.converted] == ["mlp"]
        assert report.own_parameters == own == report.to_dict()["own_parameters"]
        assert report.share == new / own
        said = " ".join(str(report).split())
        assert f"{new:,} parameters, {100 * new / own:.2g} % of the model's {own:,}" in said
        assert f"mlp with {new:,} parameters per mixer, because linear ones would have 1,000,620, more than" in said
        again = llcompile.inspect(model, torch.randn(1, 9, WIDTH), options={"level_weights": "auto"})
        assert again.own_parameters == own
        x = torch.randn(1, 9, WIDTH)
        run = compiled(model)
        before = run(x)
        torch.testing.assert_close(before, model(x), rtol=1e-4, atol=1e-4)
        nn.init.normal_(model.loglinear.bias)
        assert (run(x) - before).abs().max() > 1e-2

    def test_what_is_asked_for_is_made_and_kept(self) -> None:
        model, report = looked_at({"level_weights": "linear"})
        assert report.converted[0].level_weights == "linear"
        assert "because linear ones" not in str(report)
        for options in (None, {"level_weights": "auto"}):
            again = llcompile.convert(model, torch.randn(1, 9, WIDTH), options=options, verify=False)
            assert again.converted[0].level_weights == "linear"

    def test_a_checkpoint_of_linear_ones_loads_into_a_compiled_model(self) -> None:
        old, _ = looked_at({"level_weights": "linear"})
        new, _ = looked_at()
        nn.init.normal_(old.loglinear.weight, std=0.1)
        x, run = torch.randn(1, 9, WIDTH), compiled(new)
        before = run(x)
        new.load_state_dict(old.state_dict())
        assert new.loglinear.kind == "linear"
        assert torch.equal(run(x), compiled(old)(x))
        assert (run(x) - before).abs().max() > 1e-2


class TestOldCheckpoints:
    """Level weights that were chosen by default take the kind of a checkpoint that was made with another default."""

    def made(self, kind: str, by_default: bool = True) -> LevelWeights:
        weights = LevelWeights(kind, 3, 5, 8)
        weights.by_default = by_default
        return weights

    def trained(self, kind: str) -> LevelWeights:
        weights = self.made(kind)
        nn.init.normal_(weights.bias)
        return weights

    @pytest.mark.parametrize(("ours", "theirs"), [("mlp", "linear"), ("linear", "mlp"), ("linear", "routed")])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_kind_and_values(self, ours: str, theirs: str, dtype: torch.dtype) -> None:
        old, new = self.trained(theirs), self.made(ours)
        state = {name: value.to(dtype) for name, value in old.state_dict().items()}
        new.load_state_dict(state)
        assert (new.kind, new.sizes) == (old.kind, old.sizes)
        assert all(p.requires_grad for p in new.parameters())
        assert torch.equal(new.bias, state["bias"].float())
        assert not new.is_identity()

    def test_frozen_stays_frozen(self) -> None:
        new = self.made("mlp").requires_grad_(False)
        new.load_state_dict(self.trained("linear").state_dict())
        assert not any(p.requires_grad for p in new.parameters())

    def test_meta(self) -> None:
        new = self.made("mlp").to("meta")
        new.load_state_dict(self.trained("linear").state_dict(), assign=True)
        assert new.kind == "linear"
        assert not new.is_identity()

    def test_what_is_trained_or_asked_for_is_never_replaced(self) -> None:
        for weights in (self.trained("mlp"), self.made("mlp", by_default=False)):
            before = {name: value.clone() for name, value in weights.state_dict().items()}
            with pytest.raises(CheckpointError, match="'linear'"):
                weights.load_state_dict(self.trained("linear").state_dict())
            assert weights.kind == "mlp"
            assert all(torch.equal(value, before[name]) for name, value in weights.state_dict().items())

    def test_other_sizes_are_an_error(self) -> None:
        new = self.made("mlp")
        with pytest.raises(CheckpointError, match="heads=4"):
            new.load_state_dict(LevelWeights("linear", 4, 5, 8).state_dict())
        assert new.kind == "mlp"


class TestShare:
    """What is said of level weights that are a large part of a model."""

    def record(self, number: int, kind: str) -> Converted:
        proof = Certificate(1e-7, "float32", 3)
        return Converted("layer", "RetNet", "scalar", "none", "graph", proof, number, 2, 8, 8, level_weights=kind)

    @pytest.mark.parametrize(
        ("number", "own", "kind", "said"),
        [(20_000_000, 100_000_000, "linear", "options level_weights ('mlp' or 'static') and levels make"),
         (20_000_000, 100_000_000, "mlp", "the option levels makes"), (4_000_000, 100_000_000, "linear", ""),
         (2_000, 4_000, "linear", ""), (20_000_000, 0, "linear", "")],
    )  # fmt: skip
    def test_a_large_share_of_a_large_model_is_said(self, number: int, own: int, kind: str, said: str) -> None:
        text = " ".join(str(Report((self.record(number, kind),), own_parameters=own)).split())
        assert ("large level weights: 20 % more parameters" in text) == bool(said)
        assert said in text
        assert ("of the model's" in text) == bool(own)
