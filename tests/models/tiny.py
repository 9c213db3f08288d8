"""Tiny configs of real third-party models (random weights), one for each model type that converts by functions."""

from __future__ import annotations

from typing import Any

import torch
import transformers

_COMMON = {
    "vocab_size": 96,
    "hidden_size": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 512,
}
_ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2}
_MAMBA = {"mamba_n_heads": 6, "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_d_state": 12, "mamba_chunk_size": 16}
_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 16,
    "head_dim": 16,
}
_QWEN_MOE = {
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
_MLA = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "v_head_dim": 16, "qk_nope_head_dim": 16}
_HYBRID = ["linear_attention", "full_attention", "linear_attention"]

CONFIGS: dict[str, dict[str, Any]] = {
    "mamba2": {
        "num_heads": 6,
        "head_dim": 16,
        "state_size": 12,
        "num_hidden_layers": 2,
        "n_groups": 2,
        "chunk_size": 16,
        "expand": 2,
    },
    "bamba": {**_ATTENTION, **_MAMBA, "num_hidden_layers": 3, "attn_layer_indices": [1], "intermediate_size": 64},
    "falcon_h1": {**_ATTENTION, **_MAMBA, "mamba_d_ssm": 96, "num_hidden_layers": 2, "intermediate_size": 64},
    "granitemoehybrid": {
        **_ATTENTION,
        **_MAMBA,
        "num_hidden_layers": 3,
        "layer_types": _HYBRID,
        "intermediate_size": 64,
        "shared_intermediate_size": 32,
        "num_local_experts": 4,
    },
    "nemotron_h": {
        **_ATTENTION,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "linear_attention"],
        "head_dim": 16,
        "ssm_state_size": 12,
        "mamba_num_heads": 6,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "chunk_size": 16,
        "intermediate_size": 64,
        "n_routed_experts": 4,
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 32,
    },
    "zamba2": {
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention"],
        "mamba_d_state": 12,
        "mamba_ngroups": 2,
        "n_mamba_heads": 6,
        "chunk_size": 16,
        "intermediate_size": 64,
        "adapter_rank": 8,
    },
    "qwen3_next": {
        **_ATTENTION,
        **_DELTA,
        **_QWEN_MOE,
        "num_hidden_layers": 3,
        "layer_types": _HYBRID,
        "intermediate_size": 64,
        "decoder_sparse_step": 1,
    },
    "qwen3_5_text": {**_ATTENTION, **_DELTA, "num_hidden_layers": 3, "layer_types": _HYBRID, "intermediate_size": 64},
    "qwen3_5_moe_text": {**_ATTENTION, **_DELTA, **_QWEN_MOE, "num_hidden_layers": 3, "layer_types": _HYBRID},
    "qwen4_exp_text": {
        **_ATTENTION,
        **_DELTA,
        **_QWEN_MOE,
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
        "hc_count": 2,
        "hc_lowrank": 16,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "olmo_hybrid": {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_hidden_layers": 3,
        "layer_types": _HYBRID,
        "intermediate_size": 64,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 12,
        "linear_value_head_dim": 20,
    },
    "kimi_linear": {
        **_MLA,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": None,
        "num_hidden_layers": 3,
        "layer_types": _HYBRID,
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "num_experts_per_tok": 2,
        "num_local_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "linear_head_dim": 12,
        "linear_num_heads": 4,
    },
    "bailing_hybrid": {
        **_MLA,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_hidden_layers": 3,
        "layer_types": _HYBRID,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "num_experts": 8,
        "num_experts_per_token": 2,
        "num_expert_group": 2,
        "topk_group": 1,
        "head_dim": 12,
    },
    "glm5_next_text": {
        **_MLA,
        "qk_rope_head_dim": 0,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "index_topk": 16,
        "index_head_dim": 16,
        "index_n_heads": 2,
        "index_kpool": 4,
        "linear_head_dim": 12,
        "linear_num_heads": 4,
        "hc_mult": 2,
    },
}

# Mamba-1: a file of their own tests these (test_selective_scan.py); their caches take whole prompts and single tokens.
SELECTIVE: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 12, "num_hidden_layers": 2},
    "falcon_mamba": {"state_size": 12, "num_hidden_layers": 2},
    "jamba": {
        **_ATTENTION,
        "num_hidden_layers": 3,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mamba_d_state": 12,
        "mamba_dt_rank": 4,
        "intermediate_size": 64,
    },
    "zamba": {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "mamba_d_state": 12,
        "mamba_dt_rank": 4,
        "intermediate_size": 64,
        "n_mamba_heads": 2,
    },
}
SELECTIVE_MIXERS = dict.fromkeys(SELECTIVE, 2) | {"zamba": 8}  # two in each of its layers

# How many mixers each of them has; every one of them must convert.
MIXERS = dict.fromkeys(CONFIGS, 2) | {"zamba2": 3}


def build(name: str, seed: int = 0, **changes: Any) -> Any:
    """The tiny model of a type, in evaluation mode, with random weights."""
    config = transformers.AutoConfig.for_model(name, **{**_COMMON, **{**CONFIGS, **SELECTIVE}[name], **changes})
    torch.manual_seed(seed)
    try:
        model = transformers.AutoModelForCausalLM.from_config(config)
    except ValueError:  # text towers without a causal language model class of their own
        model = transformers.AutoModel.from_config(config)
    return model.eval()


def tokens(batch: int = 2, length: int = 37, seed: int = 1) -> torch.Tensor:
    """Random token ids [B, T] that avoid the special ones."""
    return torch.randint(3, 96, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits(output: Any) -> torch.Tensor:
    """The logits of a causal language model's output, or a text tower's last hidden states."""
    return output.logits if "logits" in output else output.last_hidden_state
