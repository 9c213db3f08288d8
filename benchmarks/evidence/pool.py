"""Processes that work off the shares of an experiment until time is up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.process import environment

_POLL = 0.5  # seconds
_GRACE = 10.0  # seconds that a process has to end by itself after its time


@dataclass(frozen=True)
class Order:
    """What was asked for on the command line.

    Args:
        experiment: its name, a module of this package.
        out: folder of all results; those of the experiment are in a folder of its name.
        minutes: for everything together.
        workers: how many processes at once.
        device: "cuda" or "cpu".
        small: sizes for two cores.
    """

    experiment: str
    out: Path
    minutes: float
    workers: int
    device: str
    small: bool

    @property
    def folder(self) -> Path:
        """Where the experiment's results are."""
        return self.out / self.experiment


def run(order: Order, shares: list[str]) -> int:
    """Work off the shares, the first ones first; returns how many processes failed."""
    deadline = time.time() + 60 * order.minutes
    waiting, failed = list(shares), 0
    running: dict[str, subprocess.Popen[bytes]] = {}
    order.folder.mkdir(parents=True, exist_ok=True)
    while waiting or running:
        while waiting and len(running) < order.workers and time.time() < deadline:
            share = waiting.pop(0)
            running[share] = _start(order, share, deadline)
        if time.time() > deadline:
            waiting.clear()
        for share, process in list(running.items()):
            if process.poll() is None and time.time() > deadline + _GRACE:
                process.kill()
                process.wait()
            if process.poll() is not None:
                del running[share]
                killed = process.returncode < 0 and time.time() > deadline
                failed += process.returncode != 0 and not killed
                print(f"{share}: {'stopped' if killed else _ending(order, share, process)}", flush=True)
        time.sleep(_POLL)
    return failed


def _start(order: Order, share: str, deadline: float) -> subprocess.Popen[bytes]:
    job = {
        "experiment": order.experiment,
        "share": share,
        "folder": str(order.folder),
        "device": order.device,
        "small": order.small,
        "deadline": deadline,
    }
    # One thread each: the models are small, and there are as many processes as cores.
    environ = {**environment(threads=1), "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    with open(order.folder / f"{share}.log", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "benchmarks.evidence.worker", json.dumps(job)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environ,
            cwd=os.getcwd(),
        )


def _ending(order: Order, share: str, process: subprocess.Popen[bytes]) -> str:
    if process.returncode == 0:
        return "done"
    log = order.folder / f"{share}.log"
    last = (log.read_text(errors="replace").strip().splitlines() or ["no message"])[-1]
    return f"exit code {process.returncode}: {last} (see {log})"
