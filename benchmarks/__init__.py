"""Run a measurement on this machine.

Times are the smallest of several repeats, to reduce the effect of other load; those of `operator` on a CPU are medians
of jobs that take turns, so that other load meets all of them. The CPU time beside each wall time shows how much of it
this process used.
"""

from __future__ import annotations

import argparse
import importlib
from typing import Any

# Each has its `add_parser(kinds)`, which sets `measure`: a function of the parsed arguments to an exit code.
MEASUREMENTS = (
    "benchmarks.operator",
    "benchmarks.rewrite",
    "benchmarks.recognition",
    "benchmarks.decode",
    "benchmarks.plot",
)


def add_parser(subparsers: Any) -> None:
    """Add ``bench`` to the command line."""
    bench = subparsers.add_parser("bench", help="run a measurement on this machine", description=__doc__)
    kinds = bench.add_subparsers(dest="what", metavar="WHAT", required=True)
    for name in MEASUREMENTS:
        importlib.import_module(name).add_parser(kinds)


def run(args: argparse.Namespace) -> int:
    """Measure what was asked for."""
    return int(args.measure(args))
