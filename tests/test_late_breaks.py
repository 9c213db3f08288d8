"""A graph break that comes after the conversion, inside of a mixer's module: its trained level weights are kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import OlmoHybridConfig, OlmoHybridForCausalLM, PreTrainedModel

import llcompile
from llcompile.passes import names
from llcompile.passes.names import CodePlace
from tests.helpers import small
from tests.helpers.block import compiled, difference

LINES = (("Mixer.forward", 87),)
OTHER_LINES = (("Mixer.forward", 94),)  # of the same call, as Dynamo may give it in a frame after a break
WHOLE = CodePlace(LINES, frozenset({"A_log", "conv.weight", "q.weight"}))


class _Candidate:
    """What `names` needs of a candidate."""

    attribute = ""
    reason: Any = None

    def decline(self, reason: Any) -> None:
        self.reason = reason


def named(after_break: bool, own: CodePlace, **held: CodePlace | None) -> _Candidate:
    candidate = _Candidate()
    names._name([candidate], [own], dict(held), after_break=after_break)  # type: ignore[list-item]
    return candidate


def test_operands_tell_after_a_break() -> None:
    found = named(True, CodePlace(OTHER_LINES, frozenset({"A_log", "conv.weight"})), loglinear=WHOLE)
    assert (found.attribute, found.reason) == ("loglinear", None)


def test_no_new_ones_after_a_break_where_nothing_tells() -> None:
    found = named(True, CodePlace(OTHER_LINES, frozenset()), loglinear=WHOLE)
    assert found.reason.code == "ambiguous-weights"


@pytest.mark.parametrize(
    ("after_break", "own"),
    [
        (True, CodePlace(OTHER_LINES, frozenset({"r.weight"}))),
        (True, CodePlace((("Mixer.other", 9),), frozenset())),
        (False, CodePlace(OTHER_LINES, frozenset({"A_log", "conv.weight"}))),
    ],
)
def test_another_mixer_has_its_own(after_break: bool, own: CodePlace) -> None:
    found = named(after_break, own, loglinear=WHOLE)
    assert (found.attribute, found.reason) == ("loglinear_2", None)


def _hybrid() -> PreTrainedModel:
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 2}
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "linear_key_head_dim": 8}
    layers = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
    config = OlmoHybridConfig(**sizes, **heads, **layers, linear_value_head_dim=8, pad_token_id=0, use_cache=False)
    return OlmoHybridForCausalLM(config).eval()


def _break(*_: Any) -> None:
    torch._dynamo.graph_break()


@pytest.mark.slow  # a model of transformers, whose forward is long enough for Dynamo to lose its lines
@pytest.mark.usefixtures("fresh_dynamo")
def test_a_break_at_a_projection() -> None:
    """As DoRA of PEFT makes them."""
    model, ids = _hybrid(), small.ids()
    llcompile.convert(model, ids, verify=False)
    small.perturb(model)

    def logits() -> Tensor:
        torch._dynamo.reset()
        return compiled(model)(ids).logits.detach()

    before, linear, own = logits(), model(ids).logits.detach(), list(model.state_dict())
    model.model.layers[0].linear_attn.v_proj.register_forward_hook(_break)
    assert difference(logits(), before) < 1e-5
    assert difference(before, linear) > 1e-3
    assert list(model.state_dict()) == own
