"""State passing: a batch that begins with the states that the batch before has left (arXiv 2507.02782).

The control that a conversion must beat on long texts: trained like that, a linear model copes with texts that are
longer than those of its training.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from llcompile.trials.passing import detached, protocol_of


def with_state(model: nn.Module, tokens: Tensor, states: Any) -> tuple[Tensor, Any]:
    """The logits [B, T, V] of a transformers model that begins with `states` (None: empty ones), and those it leaves.

    What is left has no history, so that a gradient ends at the first token of the batch. Call it and the backward
    pass inside `torch.autograd.graph.allow_mutation_on_saved_tensors()`: the cache is written in place.
    """
    protocol = protocol_of(model)
    assert protocol is not None, type(model)
    places = _places(tokens) if "position_ids" in inspect.signature(model.forward).parameters else {}
    output, after = protocol.call(model, tokens, states, places)
    return output.logits, detached(after)


def _places(tokens: Tensor) -> dict[str, Any]:
    """Positions and masks, which no linear layer reads: a cache without softmax attention cannot be asked for them."""
    positions = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
    return {"position_ids": positions, "attention_mask": {"full_attention": None, "linear_attention": None}}
