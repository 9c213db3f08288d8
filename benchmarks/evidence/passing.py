"""State passing: a batch that begins with the states that the batch before has left (arXiv 2507.02782).

The control that a conversion must beat on long texts: trained like that, a linear model copes with texts that are
longer than those of its training.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

_KEYWORDS = ("cache", "cache_params", "past_key_values")  # of transformers' models, newest first


def with_state(model: nn.Module, tokens: Tensor, states: Any) -> tuple[Tensor, Any]:
    """The logits [B, T, V] of a transformers model that begins with `states` (None: empty ones), and those it leaves.

    What is left has no history, so that a gradient ends at the first token of the batch. Call it and the backward
    pass inside `torch.autograd.graph.allow_mutation_on_saved_tensors()`: the cache is written in place.
    """
    takes = inspect.signature(model.forward).parameters
    keyword = next(name for name in _KEYWORDS if name in takes)
    output = model(tokens, use_cache=True, **{keyword: states}, **(_places(tokens) if "position_ids" in takes else {}))
    return output.logits, _detached(getattr(output, keyword))


def _places(tokens: Tensor) -> dict[str, Any]:
    """Positions and masks, which no linear layer reads: a cache without softmax attention cannot be asked for them."""
    positions = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
    return {"position_ids": positions, "attention_mask": {"full_attention": None, "linear_attention": None}}


def _detached(state: Any, depth: int = 4) -> Any:
    """The state with copies of its tensors: a cache is written in place, and autograd has kept what it held."""
    if isinstance(state, Tensor):
        return state.detach().clone()
    if isinstance(state, (list, tuple)):
        return type(state)(_detached(x, depth - 1) for x in state)
    if isinstance(state, dict):
        return {name: _detached(x, depth - 1) for name, x in state.items()}
    if depth and type(state).__module__.startswith("transformers.cache"):
        for name, value in vars(state).items():
            setattr(state, name, _detached(value, depth - 1))
    return state
