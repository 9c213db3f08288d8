"""transformers' own classes, in small sizes: Mamba-2, and Gated DeltaNet layers only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

FAMILIES = {"mamba2": "scalar decay (Mamba2ForCausalLM)", "gdn": "gated delta (Qwen3_5ForCausalLM)"}


@dataclass(frozen=True)
class Sizes:
    """Width, layers, heads, and the size of each head's state: key_dim x value_dim."""

    hidden: int
    layers: int
    heads: int
    key_dim: int
    value_dim: int
    vocabulary: int
    # The smallest and largest dt at the start, and whether decay rates start at 1, not larger.
    step: tuple[float, float] = (0.001, 0.1)
    slow: bool = False


def make(family: str, sizes: Sizes, seed: int) -> nn.Module:
    """A causal language model with random weights, in training mode."""
    import transformers

    transformers.logging.set_verbosity_error()  # it says for each layer that kernels are not installed
    torch.manual_seed(seed)
    model: nn.Module = _MAKERS[family](transformers, sizes).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("dt_bias"):
                parameter.copy_(_steps(sizes, parameter.shape))
            if name.endswith("A_log") and sizes.slow:
                parameter.zero_()
    return model


def _steps(sizes: Sizes, shape: torch.Size) -> torch.Tensor:
    """Biases of step sizes drawn as Mamba-2 draws them; Qwen3.5 starts with a constant that forgets everything."""
    low, high = (math.log(step) for step in sizes.step)
    return torch.rand(shape).mul(high - low).add(low).exp().expm1().log()


def count(model: nn.Module) -> int:
    """The number of parameters, level weights left out."""
    return sum(p.numel() for name, p in model.named_parameters() if "loglinear" not in name)


def _mamba2(transformers: Any, sizes: Sizes) -> nn.Module:
    inner = sizes.heads * sizes.value_dim
    if inner % sizes.hidden:
        raise ValueError(f"{sizes.heads} heads of {sizes.value_dim} are no multiple of the width {sizes.hidden}")
    config = transformers.Mamba2Config(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        expand=inner // sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_heads=sizes.heads,
        head_dim=sizes.value_dim,
        state_size=sizes.key_dim,
        n_groups=1,
        chunk_size=64,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    model: nn.Module = transformers.Mamba2ForCausalLM(config)
    return model


def _gdn(transformers: Any, sizes: Sizes) -> nn.Module:
    config = transformers.Qwen3_5TextConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=2 * sizes.hidden,
        num_hidden_layers=sizes.layers,
        layer_types=["linear_attention"] * sizes.layers,
        num_attention_heads=1,  # no layer of this model has softmax attention, but the rotary embedding is made
        num_key_value_heads=1,
        head_dim=32,
        linear_num_key_heads=sizes.heads,
        linear_num_value_heads=sizes.heads,
        linear_key_head_dim=sizes.key_dim,
        linear_value_head_dim=sizes.value_dim,
        linear_conv_kernel_dim=4,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    model: nn.Module = transformers.Qwen3_5ForCausalLM(config)
    return model


_MAKERS = {"mamba2": _mamba2, "gdn": _gdn}
