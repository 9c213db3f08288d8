"""What the kernels can do: each limit with the words that tell it."""

from __future__ import annotations

import importlib.util
import os

import torch

from .description import Description

# Largest K that fits: a chunk's rows, and for the delta rule a K x K matrix, must stay on the chip.
MAX_KEY_DIM = {"none": 256, "delta": 128}
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def interpreted() -> bool:
    """Whether Triton's interpreter is on, which runs kernels on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unsupported(d: Description, device: torch.device) -> str | None:
    """Why these kernels cannot run what ``d`` describes on ``device``; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type != "cuda" and not interpreted():
        return f"the operands are on {device}; Triton kernels run on CUDA and ROCm devices"
    return beyond(d)


def beyond(d: Description) -> str | None:
    """Why no device has kernels for what ``d`` describes; None if some have."""
    if d.dtype not in _DTYPES:
        return f"dtype {d.dtype} is not one of bfloat16, float16 and float32"
    limit = MAX_KEY_DIM[d.correction]
    if d.key_dim > limit:
        return f"K = {d.key_dim} does not fit on the chip; with correction {d.correction!r} the limit is {limit}"
    return None
