"""What is written with every measurement: where and when it was made, with which versions."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any


def write(path: Path, record: dict[str, Any]) -> None:
    """Write what was measured, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def environment(device: str) -> dict[str, Any]:
    """Where and when it was measured."""
    import torch

    from llcompile import __version__

    name = torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or platform.machine()
    versions = {"torch": torch.__version__, "python": platform.python_version(), "llcompile": __version__}
    for package in ("transformers", "triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    if device.startswith("cuda"):
        versions["cuda"] = str(torch.version.cuda)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": f"{name}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end",
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


def load() -> list[float]:
    """The load of the last 1, 5 and 15 minutes."""
    return [round(number, 2) for number in os.getloadavg()]


def cpu_name() -> str:
    """What the system calls the CPU, and the instructions that PyTorch uses of it."""
    import torch

    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def results_file(kind: str) -> Path:
    """Where results go by default: among the repository's."""
    return Path(__file__).resolve().parent / "results" / f"{kind}-{datetime.date.today()}.json"
