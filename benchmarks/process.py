"""A process for each measurement.

Peak memory (the resident set above what the operands take) is then that measurement's alone, and a compilation that
takes too long can be given up.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# The folder above this package, which a process of a worker must find.
_ABOVE = Path(__file__).resolve().parents[1]


def environment(threads: int | None = None) -> dict[str, str]:
    """This process' environment, for one that imports this package and has so many threads."""
    given = os.environ.get("PYTHONPATH")
    number = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    return {**os.environ, **number, "PYTHONPATH": str(_ABOVE) + (os.pathsep + given if given else "")}


def in_process(
    worker: str, jobs: list[dict[str, Any]], limit: float, late: str, threads: int | None = None
) -> list[dict[str, Any]]:
    """Run jobs in a new process of `worker`, a module that prints one line of JSON for each.

    A job without a result gets an error instead: `late` after `limit` seconds, else the last line of the process.
    """
    command = [sys.executable, "-m", worker, json.dumps(jobs)]
    with tempfile.TemporaryFile("w+") as errors, tempfile.TemporaryFile("w+") as lines:
        try:
            environ = environment(threads)
            subprocess.run(command, stdout=lines, stderr=errors, timeout=limit, check=True, env=environ)
            error = "no result"
        except subprocess.TimeoutExpired:
            error = late
        except subprocess.CalledProcessError:
            errors.seek(0)
            error = (errors.read().strip().splitlines() or ["no message"])[-1]
        lines.seek(0)
        found = [json.loads(line) for line in lines if line.startswith("{")]
    found += [{"error": error}] * (len(jobs) - len(found))
    return [{"job": job, **result} for job, result in zip(jobs, found, strict=True)]
