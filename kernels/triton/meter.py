"""Measurements of launches on the GPU that is current, for `autotune`."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch

from llcompile.kernels.triton.launch import Launch
from llcompile.kernels.triton.limits import refusals
from llcompile.kernels.triton.toolchain import toolchain_of
from llcompile.kernels.triton.tuning import Tuning


@lru_cache(maxsize=64)
def meter_of(index: int) -> Meter:
    """The meter of a CUDA or ROCm device, the same object for the whole process."""
    return Meter(index)


class Meter:
    """Compiles launches to see what they take, and times them with events on the device.

    What is chosen under one `name`, of the device, of Triton and of ptxas, holds for no other: it was tested with them.
    """

    def __init__(self, index: int) -> None:
        found = toolchain_of(torch.device("cuda", index))
        major, minor = torch.cuda.get_device_capability(index)
        self.name = f"{torch.cuda.get_device_name(index)} ({major}.{minor}), {found}"

    def ready(self) -> bool:
        """Whether there can be a measurement now: timing waits for the device, which no capture of a graph allows."""
        return not torch.cuda.is_current_stream_capturing()

    def refused(self, launch: Launch, chosen: Tuning) -> str | None:
        """Why the device cannot run `launch` with these parameters; None if it can, whatever they spill."""
        try:
            # Loads it, which raises where the device has too little shared memory.
            launch.compiled(chosen)._init_handles()
        except (RuntimeError, *refusals()) as error:  # type: ignore[misc]
            return f"{type(error).__name__}: {error}".splitlines()[0]
        return None

    def spilled(self, launch: Launch, chosen: Tuning) -> int:
        """Registers that `launch` spills with these parameters, which `refused` has compiled."""
        return int(launch.compiled(chosen).n_spills)

    def milliseconds(self, run: Callable[[], None]) -> float:
        """Median of the runs that fit into 20 ms, after 5 ms to warm up, with an L2 cache cleared before each."""
        from triton.testing import do_bench

        found = do_bench(run, warmup=5, rep=20, return_mode="median")
        assert isinstance(found, float)
        return found
