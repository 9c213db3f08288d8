"""Zoo models, converted and given level weights that are not 1."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tests.models import tiny

# These break in their sparse attention's indexer also without us.
BREAKING = {"qwen4_exp_text", "glm5_next_text"}


def lively(model: nn.Module) -> nn.Module:
    """Larger weights than a config's tiny initial ones: with those a mixer adds almost nothing to the logits, and a
    wrong one would not be seen. Step sizes of Mamba-2 of around 0.5 make states that last."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and not any(part in name for part in ("embed", "conv", "loglinear")):
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
            elif name.endswith("dt_bias"):
                parameter.uniform_(-1.5, 0.0, generator=generator)
    return model


def compiled(model: nn.Module, inner: str = "eager", **given: Any) -> Any:
    return torch.compile(model, backend="loglinear", options={"inner": inner, **given.pop("options", {})}, **given)


def weights_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if "loglinear" in name}


def steps(model: Any, name: str, ids: Tensor, prefill: int) -> Iterator[Tensor]:
    """The logits of ids, the first `prefill` tokens at once and then one by one through the model's own cache.

    Positions are given: transformers 5.24's bamba counts them from 0 in each call.
    """
    out = model(ids[:, :prefill], use_cache=True)
    yield tiny.logits(out)
    key = "cache_params" if name == "mamba2" else "past_key_values"
    for t in range(prefill, ids.shape[1]):
        position = torch.full((ids.shape[0], 1), t, device=ids.device)
        out = model(ids[:, t : t + 1], use_cache=True, position_ids=position, **{key: out[key]})
        yield tiny.logits(out)
