"""One process of an experiment: `python -m benchmarks.evidence.worker JOB`, with the job as JSON."""

from __future__ import annotations

import importlib
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Job:
    """One share of an experiment.

    Args:
        share: its name, which the experiment's `work` understands.
        folder: where its results go.
        deadline: seconds since the epoch.
    """

    experiment: str
    share: str
    folder: Path
    device: str
    small: bool
    deadline: float

    def tick(self) -> None:
        """End the process when time is up; called between steps. What was found before is in the store."""
        if time.time() > self.deadline:
            print("time is up", flush=True)
            raise SystemExit(0)


def main() -> int:
    """Work off the share that the command line describes."""
    given = json.loads(sys.argv[1])
    job = Job(**{**given, "folder": Path(given["folder"])})
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = True
    importlib.import_module(f"benchmarks.evidence.{job.experiment}").work(job)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
