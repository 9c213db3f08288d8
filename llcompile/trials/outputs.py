"""What goes into a user's model, and which part of what comes out are the logits."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from llcompile.errors import TrialError
from llcompile.trials.batches import Batch


def inputs(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """The keyword inputs of a call: those of the batch, and no cache, which would only cost time."""
    takes = inspect.signature(model.forward).parameters
    return {**({"use_cache": False} if "use_cache" in takes else {}), **batch.inputs}


def logits_of(output: Any) -> Tensor:
    """The logits in what a model returned: itself, its `logits`, or its first part.

    Raises:
        TrialError: there is no such tensor [B, T, vocabulary].
    """
    found = output
    if isinstance(output, Mapping) and "logits" in output:
        found = output["logits"]
    elif hasattr(output, "logits"):
        found = output.logits
    elif isinstance(output, (tuple, list)) and output:
        found = output[0]
    if not isinstance(found, Tensor) or found.dim() != 3:
        shape = f"a tensor {list(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise TrialError(
            f"the model returned {shape}; expected logits [B, T, vocabulary], or an output with `logits`. Pass your "
            "own `loss(model, batch)` for another kind of model"
        )
    return found
