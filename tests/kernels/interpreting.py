"""A process in which Triton's interpreter is on: it has to be chosen before Triton is imported."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from tests.kernels import triton_cases


@contextmanager
def interpreter(kernels: Path) -> Iterator[ProcessPoolExecutor]:
    """The process, with generated files in the folder `kernels`."""
    settings = {"TRITON_INTERPRET": "1", "LLCOMPILE_KERNEL_DIR": str(kernels)}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        pool.submit(triton_cases.settled).result()  # the process has started: it has the settings
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
        yield pool
