"""Third-party models whose mixer stands inline: recognised by structure, at any length."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import llcompile
from tests.helpers.small import difference

CONFIG: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "intermediate_size": 64,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "block_size": 16,
    "max_position_embeddings": 512,
}


# Shorter than a block, of which 11 is also a length that the search tries by itself; one and several blocks, uneven.
# (test_inline_decode has two uneven blocks in `make test`.)
@pytest.mark.parametrize("length", [7, *(pytest.param(n, marks=pytest.mark.slow) for n in (11, 16, 37))])
def test_lightning_attention_of_minimax(length: int) -> None:
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("minimax", **CONFIG)).eval()
    tokens = torch.randint(3, 96, (2, length))
    before = model(tokens, use_cache=False).logits
    report = llcompile.convert(model, tokens, use_cache=False)
    assert [(c.decay, c.correction, c.origin) for c in report.converted] == [("scalar", "none", "graph")]
    assert report.declined == ()
    assert [u.kind.split(" (")[0] for u in report.untouched] == ["softmax attention"]
    with torch.no_grad():
        after = torch.compile(model, backend="loglinear", options={"inner": "eager"})(tokens, use_cache=False).logits
    assert difference(after, before) < 1e-5
