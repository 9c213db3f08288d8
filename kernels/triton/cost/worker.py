"""A process with Triton's interpreter on: counts the cases that it reads as JSON, and writes the counts as JSON."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict

from llcompile.errors import KernelError
from llcompile.kernels.triton import autotune, interpreter
from llcompile.kernels.triton.chips import DEFAULT
from llcompile.kernels.triton.cost.case import Case
from llcompile.kernels.triton.cost.counter import Counted, counting, one_sequence
from llcompile.kernels.triton.cost.families import STEPS
from llcompile.kernels.triton.launch import Kernels, Launch
from llcompile.kernels.triton.limits import interpreted


def count(case: Case) -> list[Counted]:
    """The launches of `case`, run here in the interpreter with the tiles that `chips.DEFAULT` gets."""

    def run(launch: Launch) -> None:
        launch = copy.copy(launch)
        launch.kernel = Kernels(launch.kernel.d.on(DEFAULT), DEFAULT)[launch.kernel.name]
        launch(launch.kernel.default)

    interpreter.prepare()
    act = case.runner("cpu")
    units = case.groups if case.decay == "rate" and case.operation not in STEPS else case.heads
    with autotune.handed_to(run), counting(one_sequence(case.batch * units)) as found:
        act()
    return found


def counts(cases: Iterable[Case]) -> list[list[Counted]]:
    """The launches of each case, counted in a process of its own.

    Raises:
        KernelError: that process failed; its last line says why.
    """
    given = json.dumps([asdict(case) for case in cases])
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    # Its results have a pipe of their own: what libraries print goes where it always goes.
    done = subprocess.run(
        [sys.executable, "-m", __name__], input=given, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise KernelError(f"counting in Triton's interpreter failed: {last}; is Triton installed (pip install triton)?")
    return [[_counted(row) for row in rows] for rows in json.loads(done.stdout.splitlines()[-1])]


def _counted(row: dict[str, object]) -> Counted:
    return Counted(row["kernel"], tuple(row["grid"]), Counter(row["numbers"]))  # type: ignore[arg-type, call-overload]


def main() -> None:
    """Read, count, write."""
    assert interpreted()
    cases = [Case(**fields) for fields in json.load(sys.stdin)]
    found = [[{**vars(launch), "numbers": dict(launch.numbers)} for launch in count(case)] for case in cases]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
