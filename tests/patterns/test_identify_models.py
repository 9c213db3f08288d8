"""What the report says of whole models of transformers: the converted mixers once, everything else by its name."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import transformers

import llcompile
from tests.patterns.identified import watched

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

_COMMON = {"vocab_size": 96, "hidden_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GQA = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 512}
_MAMBA = {"mamba_n_heads": 6, "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_d_state": 12, "mamba_chunk_size": 16}
_DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
_DELTA |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
_MLA = {"kv_lora_rank": 16, "q_lora_rank": None, "qk_rope_head_dim": 8, "v_head_dim": 16, "qk_nope_head_dim": 16}
_MOE = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 32}
CONFIGS: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 8, "num_hidden_layers": 2},
    "recurrent_gemma": {**_GQA, "num_key_value_heads": 1, "num_hidden_layers": 3, "attention_window_size": 16},
    "lfm2": {**_GQA, "num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    "minimax": {**_GQA, "num_hidden_layers": 2, "head_dim": 12, "num_local_experts": 4, "block_size": 16},
    "qwen3_next": {**_GQA, **_DELTA, **_MOE, "head_dim": 16, "num_hidden_layers": 4},
    "kimi_linear": {
        **_GQA,
        **_MLA,
        "num_key_value_heads": 4,
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "moe_intermediate_size": 32,
        "num_experts_per_tok": 2,
        "num_local_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "linear_head_dim": 12,
        "linear_num_heads": 4,
    },
    "bamba": {**_GQA, **_MAMBA, "num_hidden_layers": 3, "attn_layer_indices": [1]},
    "mistral": {**_GQA, "num_hidden_layers": 2, "sliding_window": 16},
    "gemma2": {**_GQA, "num_hidden_layers": 2, "head_dim": 12, "sliding_window": 16, "query_pre_attn_scalar": 12},
    "gpt2": {"n_embd": 48, "n_head": 4, "n_layer": 1, "n_positions": 64},
    "bert": {**_GQA, "num_hidden_layers": 1},
}
ATTENTION = "softmax attention (GQA, 4 heads over 2 groups)"
WINDOW = "softmax attention (GQA, 4 heads over 2 groups, sliding window 16)"
EXPECTED = {
    "mamba": {},
    "recurrent_gemma": {
        "model.layers.0.temporal_block.rg_lru": "gated linear recurrence (RG-LRU)",
        "model.layers.1.temporal_block.rg_lru": "gated linear recurrence (RG-LRU)",
        "model.layers.2.temporal_block": "softmax attention (MQA, 4 heads, sliding window 16)",
    },
    "lfm2": {
        "model.layers.0.conv": "short convolution (kernel 3)",
        "model.layers.1.self_attn": ATTENTION,
        "model.layers.2.conv": "short convolution (kernel 3)",
    },
    "minimax": {"model.layers.0.self_attn": ATTENTION},
    "qwen3_next": {"model.layers.3.self_attn": ATTENTION},
    "kimi_linear": {"model.layers.1.self_attn": "multi-head latent attention (MLA)"},
    "bamba": {"model.layers.1.self_attn": ATTENTION},
    "mistral": dict.fromkeys(("model.layers.0.self_attn", "model.layers.1.self_attn"), WINDOW),
    "gemma2": {"model.layers.0.self_attn": WINDOW, "model.layers.1.self_attn": ATTENTION},
    "gpt2": {"transformer.h.0.attn": "softmax attention (MHA, 4 heads)"},
    "bert": {"bert.encoder.layer.0.attention.self": "softmax attention (MHA, 4 heads, bidirectional)"},
}


def build(name: str, **given: Any) -> Any:
    config = transformers.AutoConfig.for_model(name, **{**_COMMON, **CONFIGS[name]})
    torch.manual_seed(0)
    kind = transformers.AutoModelForMaskedLM if name == "bert" else transformers.AutoModelForCausalLM
    return kind.from_config(config, **given).eval()


def tokens(length: int) -> torch.Tensor:
    return torch.randint(3, 96, (2, length), generator=torch.Generator().manual_seed(1))


@functools.cache
def seen(name: str) -> llcompile.Report:
    """Through the front door, so that mixers that are converted or declined are known."""
    return llcompile.inspect(build(name), tokens(24)).report


@pytest.mark.parametrize("name", EXPECTED)
def test_models(name: str) -> None:
    report = seen(name)
    said = {u.module: u.kind for u in report.untouched}
    mixers = {r.module for r in (*report.converted, *report.declined)}
    assert {module: kind for module, kind in said.items() if module not in mixers} == EXPECTED[name]
    assert not mixers & set(said), "named twice"


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gpt2"])
def test_attention_in_two_products(name: str) -> None:
    records = watched(build(name, attn_implementation="eager"), tokens(24)).records
    assert {r.module: r.kind for r in records} == EXPECTED[name]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_mask_of_padding_leaves_the_window(implementation: str) -> None:
    padding = torch.ones(2, 24, dtype=torch.long)
    padding[0, :5] = 0
    watch = watched(build("mistral", attn_implementation=implementation), tokens(24), attention_mask=padding)
    assert {r.module: r.kind for r in watch.records} == EXPECTED["mistral"]


def test_a_decode_step_says_less() -> None:
    """With one query there is nothing to tell masks apart by."""
    model = build("bamba")
    with torch.no_grad():
        cache = model(tokens(8), use_cache=True).past_key_values
    records = watched(model, tokens(1), past_key_values=cache, use_cache=True).records
    assert [r.kind for r in records if r.module == "model.layers.1.self_attn"] == [ATTENTION]


def test_many_layers_on_no_device() -> None:
    """The time grows with the model; nothing is computed, and a window is found without the data either."""
    settings = {**_COMMON, **CONFIGS["mistral"], "num_hidden_layers": 12}
    config = transformers.AutoConfig.for_model("mistral", **settings)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        ids = torch.zeros(2, 300, dtype=torch.long)
    watch = watched(model, ids, use_cache=False)
    assert [r.kind for r in watch.records] == [WINDOW] * 12
    assert watch.seconds < 1e-3 * watch.nodes


def test_the_report_shows_it() -> None:
    report = seen("lfm2")
    text = str(report)
    assert "left untouched, short convolution (kernel 3): model.layers.0,2.conv" in text
    assert f"left untouched, {ATTENTION}: model.layers.1.self_attn" in text
    shown = next(u for u in report.to_dict()["untouched"] if u["module"] == "model.layers.1.self_attn")
    assert (shown["kind"], shown["heads"], shown["groups"]) == (ATTENTION, 4, 2)
    assert ":" in shown["where"]
