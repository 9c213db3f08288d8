"""Converting and compiling the small model."""

from __future__ import annotations

from typing import Any

import torch

# Linear and log-linear form are summed in another order: float32 rounding and no more.
TIGHT = 1e-5


def compiled(model: Any, inner: str = "eager", **given: Any) -> Any:
    options = {"inner": inner, **given.pop("options", {})}
    return torch.compile(model, backend="loglinear", options=options, **given)
