"""Measurements of launches on the GPU that is current, for :mod:`.autotune`."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from llcompile.kernels.triton.launch import Launch
from llcompile.kernels.triton.limits import refusals
from llcompile.kernels.triton.tuning import Tuning


def current() -> DeviceMeter:
    """The meter of the current CUDA or ROCm device."""
    return _meter(torch.cuda.current_device())


@lru_cache(maxsize=64)
def _meter(index: int) -> DeviceMeter:
    return DeviceMeter(index)


class DeviceMeter:
    """Compiles launches to see what they take, and times them with events on the device."""

    def __init__(self, index: int) -> None:
        import triton

        major, minor = torch.cuda.get_device_capability(index)
        self.name = f"{torch.cuda.get_device_name(index)} ({major}.{minor}), triton {triton.__version__}"
        self._spills: dict[int, int] = {}  # of the kernels' defaults, by id: they live as long as the process

    def ready(self) -> bool:
        """Not while a CUDA graph is captured: timing waits for the device."""
        return not torch.cuda.is_current_stream_capturing()

    def refused(self, launch: Launch, chosen: Tuning) -> str | None:
        """What does not compile or does not fit; what spills more than the default does."""
        kernel = launch.kernel
        if id(kernel) not in self._spills and chosen != kernel.default:
            self.refused(launch, kernel.default)
        try:
            spills = _spilled(launch.compiled(chosen))
        except (RuntimeError, *refusals()) as error:  # type: ignore[misc]
            return f"{type(error).__name__}: {error}".splitlines()[0]
        if chosen == kernel.default:
            self._spills[id(kernel)] = spills
        allowed = self._spills.get(id(kernel), 0)
        return f"{spills} registers spilled, by the default {allowed}" if spills > allowed else None

    def milliseconds(self, run: Callable[[], None]) -> float:
        """Median of the runs that fit into 20 ms, after 5 ms to warm up, with an L2 cache cleared before each."""
        from triton.testing import do_bench

        found = do_bench(run, warmup=5, rep=20, return_mode="median")
        assert isinstance(found, float)
        return found


def _spilled(compiled: Any) -> int:
    """Registers that were spilled; loads the kernel, which raises where the device has too little shared memory."""
    compiled._init_handles()
    return int(compiled.n_spills)
