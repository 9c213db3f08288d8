"""A model whose decode step is written out in its own code: prefill keeps its levels, a step is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import llcompile
from llcompile.backend import last_report
from llcompile.errors import MissedLevelWeightsError
from tests.helpers import small
from tests.helpers.small import difference
from tests.models import tiny
from tests.models.converted import lively
from tests.models.padding import padded

pytestmark = pytest.mark.usefixtures("warm_dynamo")

SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "num_local_experts": 2,
    "block_size": 16,
    "layer_types": ["linear_attention", "full_attention"],
}


@pytest.fixture(scope="module")
def minimax() -> Any:
    """Lightning attention, whole and by step, in the model's own code."""
    config = transformers.AutoConfig.for_model("minimax", **SIZES, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    model = lively(transformers.AutoModelForCausalLM.from_config(config).eval())
    report = llcompile.convert(model, tiny.tokens(2, 21))
    assert [c.origin for c in report.converted] == ["graph"]
    assert "receives such a state is refused" in report.converted[0].notes[-1]
    small.perturb(model)
    # Its loop over blocks is written out for one length at a time.
    model.compile(backend="loglinear", options={"inner": "eager"}, dynamic=False)
    return model


def test_a_linear_state_that_comes_back_in_is_told(minimax: Any) -> None:
    """Prefill keeps its levels though a state is handed out; the step that reads the state has none, and says so."""
    ids = tiny.tokens(2, 21)
    with torch.no_grad():
        prefilled = minimax(ids, use_cache=True)
        assert [c.module.split(".")[-1] for c in last_report().converted] == ["self_attn"]
        assert difference(prefilled.logits, minimax(ids, use_cache=False).logits) < 1e-5
        with pytest.raises(MissedLevelWeightsError, match="the compiled graph does not read them"):
            minimax(ids[:, :1], past_key_values=prefilled.past_key_values, use_cache=True)


def test_generate_without_a_cache_has_levels(minimax: Any) -> None:
    ids = tiny.tokens(1, 8)
    with torch.no_grad():
        written = minimax.generate(ids, max_new_tokens=2, do_sample=False, use_cache=False, eos_token_id=None)
        # Each length is traced anew, so one pass over what was written: each token is the likeliest after the others.
        logits = tiny.logits(minimax(written[:, :-1], use_cache=False))
        assert torch.equal(written[:, 8:], logits[:, 7:].argmax(-1))
    assert [c.origin for c in last_report().converted] == ["graph"]


def test_padding_reaches_it(minimax: Any) -> None:
    ids, mask, rows = padded("left")
    with torch.no_grad():
        for row, sequence in enumerate(rows):
            alone = minimax(sequence, use_cache=False).logits[0]
            logits = minimax(ids, attention_mask=mask, use_cache=False).logits[row]
            assert difference(logits[mask[row] == 1], alone) < 1e-5
