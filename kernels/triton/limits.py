"""What the kernels can do: each limit with the words that tell it."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from functools import lru_cache

import torch

from llcompile.kernels.description import Correction, Description, ReadoutDescription
from llcompile.kernels.triton import faults
from llcompile.kernels.triton.chips import Chip, chip_of
from llcompile.kernels.triton.toolchain import toolchain_of

# Largest K that fits, by the KB of shared memory that a program may have and the bytes of an operand's number: the rows
# of a chunk, and for the delta rule a K x K matrix, must stay on the chip. The first entry that applies holds.
_MAX_KEY_DIM: tuple[tuple[str, int, int, dict[Correction, int]], ...] = (
    ("cuda", 160, 2, {"none": 256, "delta": 128}),
    ("cuda", 96, 2, {"none": 128, "delta": 64}),
    ("cuda", 227, 4, {"none": 128, "delta": 128}),
    ("cuda", 160, 4, {"none": 128, "delta": 64}),
    ("cuda", 96, 4, {"none": 64, "delta": 64}),
    ("hip", 64, 2, {"none": 128, "delta": 128}),
    ("hip", 64, 4, {"none": 128, "delta": 128}),
)
# Decays by rates: with 17 levels, the states of one head are 32 numbers for each of 256 threads.
_MAX_RATED_KEY_DIM = 256
# Triton's own README: NVIDIA GPUs of compute capability 8.0 and later.
_LEAST_CAPABILITY = (8, 0)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@lru_cache(maxsize=64)
def capability(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of an NVIDIA device; None of any other, and where there is none."""
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(device)


def current(x: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Where the device of `x` is the current one; entering it where it is already takes longer than to ask."""
    device = x.device
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def interpreted() -> bool:
    """Whether Triton's interpreter is on, which runs kernels on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def refusals() -> tuple[type[BaseException], ...]:
    """What Triton raises for kernels that it cannot make: no room on the chip, no way through its compiler."""
    try:
        from triton.compiler.errors import CompilationError
        from triton.runtime.errors import TritonError
    except ImportError:
        return (ImportError,)
    return (ImportError, CompilationError, TritonError)


def unsupported(d: Description | ReadoutDescription, device: torch.device) -> str | None:
    """Why these kernels cannot run what `d` describes on `device`; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type != "cuda" and not interpreted():
        return f"the operands are on {device}; Triton kernels run on CUDA and ROCm devices"
    found = capability(device)
    if found is not None and found < _LEAST_CAPABILITY:
        least = ".".join(map(str, _LEAST_CAPABILITY))
        return f"{device} has compute capability {found[0]}.{found[1]}; Triton needs {least} or later"
    if not interpreted() and (fault := faults.refusal(toolchain_of(device))):
        return fault
    if isinstance(d, ReadoutDescription):
        return _beyond_dtypes(d.dtype)
    return beyond(d, chip_of(device))


def beyond(d: Description, chip: Chip) -> str | None:
    """Why `chip` has no kernels for what `d` describes; None if it has."""
    if d.without_kernels:
        return d.without_kernels
    if reason := _beyond_dtypes(d.dtype):
        return reason
    limit = max_key_dim(d, chip)
    if d.decay == "rate" and d.key_dim > limit:
        return f"K = {d.key_dim} is more than their {limit} for decays by rates, whose states stay in registers"
    if d.key_dim > limit:
        room = f"{chip.shared // 1024} KB of shared memory for a program"
        kind = f"correction {d.correction!r} and {d.dtype_name} operands"
        return f"K = {d.key_dim} does not fit on the chip ({chip.name}, {room}); with {kind} the limit is {limit}"
    return None


def _beyond_dtypes(dtype: torch.dtype) -> str | None:
    return None if dtype in _DTYPES else f"dtype {dtype} is not one of bfloat16, float16 and float32"


def max_key_dim(d: Description, chip: Chip) -> int:
    """The largest K that fits on `chip`, all else being as in `d`; 0 if none does."""
    if d.decay == "rate":
        return _MAX_RATED_KEY_DIM
    for backend, room, width, limits in _MAX_KEY_DIM:
        if backend == chip.backend and chip.shared >= room * 1024 and d.dtype.itemsize == width:
            return limits["none" if d.correction == "none" else "delta"]
    return 0
