"""What is written with every measurement: where and when it was made, with which versions."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any


def write(path: Path, record: dict[str, Any]) -> None:
    """Write what was measured, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def environment(device: str) -> dict[str, Any]:
    """Where and when it was measured."""
    import os

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
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


def results_file(kind: str) -> Path:
    """Where results go by default: among the repository's."""
    return Path(__file__).resolve().parent / "results" / f"{kind}-{datetime.date.today()}.json"
