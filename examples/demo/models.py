"""The models of the demo: third-party code with random weights, in sizes for a laptop."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from demo.recall import Task
from llcompile.errors import SpecError

_MAMBA2 = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_heads": 8,
    "head_dim": 16,
    "state_size": 16,
    "n_groups": 2,
    "chunk_size": 32,
}
_QWEN3_NEXT = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
# model_type and sizes of the models that are converted and looked at.
TOUR: tuple[tuple[str, dict[str, Any]], ...] = (("mamba2", _MAMBA2), ("qwen3_next", _QWEN3_NEXT))

# One layer whose one head has a state of 4 x 32 numbers. Slow forgetting at the start (dt from 0.02 to 0.2, A = 1).
_RECALL = {
    "hidden_size": 32,
    "expand": 1,
    "num_hidden_layers": 1,
    "num_heads": 1,
    "head_dim": 32,
    "state_size": 4,
    "n_groups": 1,
    "conv_kernel": 4,
    "time_step_min": 0.02,
    "time_step_max": 0.2,
}


def tour_model(model_type: str, sizes: dict[str, Any], seed: int = 0) -> nn.Module:
    """A causal language model of transformers with random weights."""
    transformers = _transformers()
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(model_type, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config).eval()
    return model


def recall_model(task: Task, seed: int = 0) -> nn.Module:
    """The Mamba-2 that learns recall: transformers' own class, fresh from its constructor."""
    transformers = _transformers()
    torch.manual_seed(seed)
    special = {"pad_token_id": task.blank, "bos_token_id": task.blank, "eos_token_id": task.blank}
    config = transformers.Mamba2Config(vocab_size=task.vocabulary, chunk_size=task.length, **special, **_RECALL)
    model: nn.Module = transformers.Mamba2ForCausalLM(config).train()
    return model


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise SpecError("the demo needs transformers: pip install 'llcompile[demo]'") from None
    transformers.logging.set_verbosity_error()  # it says for each layer that mamba_ssm is not installed
    return transformers
