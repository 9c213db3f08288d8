"""Whether a call's buffers fit into the device's memory, said before the first launch."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from llcompile.errors import KernelMemoryError
from llcompile.kernels.operands import Operands
from llcompile.kernels.triton.buffers import Arguments
from llcompile.kernels.triton.launch import Kernels

# What is less is not compared with what is free: asking the driver takes longer than a small call.
SMALL = 1 << 30


def check(x: Operands, arguments: Arguments, kernels: Kernels, names: Iterable[str]) -> None:
    """Raise `KernelMemoryError` if the buffers that the kernels `names` will allocate do not fit."""
    wanted = workspace(arguments, kernels, names)
    if wanted <= SMALL:
        return
    free = free_bytes(arguments.device)
    if free is not None and wanted > free:
        raise error(x, wanted, free)


def error(x: Operands, wanted: int, free: int, instead: str = "") -> KernelMemoryError:
    """What says that `x` takes `wanted` bytes where `free` are; `instead` is what would fit, if anything does."""
    return KernelMemoryError(
        f"the buffers for values {list(x.v.shape)}, queries and keys {list(x.q.shape)} take {wanted / 1e9:.1f} GB, and "
        f"{free / 1e9:.1f} GB are free on {x.v.device}; {instead}they grow with rows * tokens * heads: use fewer rows "
        "or shorter sequences in a call, or continue a long sequence from the state of its first part"
    )


def workspace(arguments: Arguments, kernels: Kernels, names: Iterable[str]) -> int:
    """Bytes of the buffers that the kernels `names` take and that are not there yet."""
    sizes, forms, found = arguments.sizes, arguments.forms, 0
    for name in kernels.buffers(tuple(names)):
        if name not in arguments:
            names_of_axes, dtype = forms[name]
            found += math.prod([sizes[axis] for axis in names_of_axes]) * dtype.itemsize
    return found


def free_bytes(device: torch.device) -> int | None:
    """What can be allocated on `device` now, counting what torch holds and does not use; None where nobody can say."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
