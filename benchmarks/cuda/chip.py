"""What the machine is and what it does: measured at the start of every run, since a data sheet is no ceiling."""

from __future__ import annotations

import subprocess
from typing import Any

import torch

from benchmarks.cuda.timing import timed, watch_for

_COPIED = 4 * 2**30  # bytes, far beyond any cache
_SIDE = 8192


def measure(device: str) -> dict[str, Any]:
    """Name, driver and memory; ``bandwidth`` (bytes/s, read + written), ``rate`` (bf16 operations/s)."""
    found = {"name": _name(device), "driver": _driver(device), "memory_gib": _memory(device)}
    return {**found, "bandwidth": bandwidth(device), "rate": rate(device)}


def bandwidth(device: str, size: int = _COPIED) -> float:
    """Bytes per second of a copy on the device, bytes read and bytes written together."""
    source = torch.empty(size // 4, dtype=torch.int32, device=device).random_()
    target = torch.empty_like(source)
    found = timed(lambda: target.copy_(source), watch_for(device))
    return 2 * source.nbytes / (found.milliseconds * 1e-3)


def rate(device: str, side: int = _SIDE) -> float:
    """Operations per second of a bf16 matrix product on random data (it is faster on zeros)."""
    a, b = (torch.randn(side, side, device=device).to(torch.bfloat16) for _ in range(2))
    found = timed(lambda: a @ b, watch_for(device), warm=0.5)
    return 2 * side**3 / (found.milliseconds * 1e-3)


def _name(device: str) -> str:
    return torch.cuda.get_device_name() if device.startswith("cuda") else device


def _memory(device: str) -> float | None:
    if not device.startswith("cuda"):
        return None
    return round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1)


def _driver(device: str) -> str | None:
    """The driver's version as nvidia-smi tells it; None where there is none to ask."""
    if not device.startswith("cuda"):
        return None
    question = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(question, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.strip().splitlines()[0]
