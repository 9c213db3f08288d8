"""What is installed against what was tested, and the one announcement of a release that is newer than all of it."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

from llcompile.errors import UntestedVersionWarning

# Distribution: oldest and newest release in which every row of the self-test acted (see docs/compatibility.md, which
# `make matrix` writes).
TESTED: dict[str, tuple[str, str]] = {
    "torch": ("2.11.0", "2.15.0"),
    "transformers": ("5.15.0", "5.24.0"),
    "fla-core": ("0.6.0", "0.6.0"),
}
VARIABLE = "LLCOMPILE_SELF_TEST"
TIMEOUT = 180
# The module that a program imports where a distribution is in use.
_MODULES = {"torch": "torch", "transformers": "transformers", "fla-core": "fla"}


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version: "2.15.0.dev1+cu132" is (2, 15, 0)."""
    found = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(part) for part in found.group().split(".")] if found else []
    return (*numbers, 0, 0, 0)[: max(3, len(numbers))]


def installed(distribution: str) -> str | None:
    """The version of a distribution; None where it is not installed."""
    if distribution == "torch":
        import torch

        return str(torch.__version__)
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def older(distribution: str) -> bool:
    """Whether what is installed is older than every release that was tested."""
    version = installed(distribution)
    return version is not None and release(version) < release(TESTED[distribution][0])


def newer(distribution: str) -> bool:
    """Whether what is installed is newer than every release that was tested."""
    version = installed(distribution)
    return version is not None and release(version) > release(TESTED[distribution][1])


@functools.cache
def announce() -> None:
    """Says at the first compilation of the process which releases in use are newer than every tested one.

    The self-test that says what acts runs in a process of its own: the compilation under way is not disturbed, whatever
    modes, locks and contexts it stands in. Of several processes of one job the first of each machine does it.
    """
    if os.environ.get(VARIABLE) == "0" or os.environ.get("LOCAL_RANK", "0") != "0":
        return
    in_use = [name for name, module in _MODULES.items() if module in sys.modules and newer(name)]
    if in_use:
        named = ", ".join(f"{name} {installed(name)} (newest tested: {TESTED[name][1]})" for name in in_use)
        warnings.warn(
            f"llcompile was not tested with {named}. A self-test ran just now: {self_test()}. "
            f"Run `llcompile doctor` for the details; {VARIABLE}=0 switches it off.",
            UntestedVersionWarning,
            stacklevel=2,
        )


def self_test() -> str:
    """The result of `llcompile doctor`'s self-test, run by another process, in a sentence."""
    command = [sys.executable, "-m", "llcompile", "doctor", "--json"]
    path = os.pathsep.join([str(Path(__file__).parent.parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, VARIABLE: "0", "PYTHONPATH": path}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False)
        findings = json.loads(done.stdout[done.stdout.index("[") :])
    except subprocess.TimeoutExpired:
        return f"it did not finish in {TIMEOUT} seconds"
    except (OSError, ValueError):
        return "it could not be run"
    rows = [finding for finding in findings if finding["topic"].startswith("self-test")]
    failed = [f"{row['topic'].partition(': ')[2]} ({row['found']})" for row in rows if row["ok"] is False]
    acting = sum(row["ok"] is True for row in rows)
    return f"{acting} models pass" + (f", these fail: {'; '.join(failed)}" if failed else "")
