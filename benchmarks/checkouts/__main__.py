"""Compares two checkouts of llcompile: what they say of the corpus and of models, and the CPU time that each takes.

    python -m benchmarks.checkouts BEFORE AFTER --corpus --json FILE
    python -m benchmarks.checkouts BEFORE AFTER --models zoo.json --repeats 3 --json FILE

Both run in turns, so that other work on the machine weighs on both; of each time the smallest counts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.record import environment, write

WORKER = Path(__file__).with_name("worker.py")
STEPS = ("inspect", "convert", "convert, verified")
BATCH = 20  # layers of the corpus for each process


def main() -> int:
    """Runs the jobs in both checkouts, prints a table, and writes JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkouts", description=__doc__)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--corpus", action="store_true", help="inspect every layer and near miss of tests/spellings")
    parser.add_argument(
        "--models", type=Path, metavar="FILE", help="JSON of models, as for `llcompile bench recognition`"
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--repeats", type=int, default=1, metavar="N", help="how often each is run (default 1)")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="file for the results")
    args = parser.parse_args()
    places = {"before": args.before.resolve(), "after": args.after.resolve()}
    results: dict[str, dict[str, Any]] = {}
    for batch in batches(args):
        for _ in range(args.repeats):
            for side, place in places.items():
                for found in run(place, batch):
                    add(results.setdefault(found.pop("name"), {}).setdefault(side, {}), found)
        commits = {side: commit(place) for side, place in places.items()}
        write(args.json, {**environment("cpu"), "commits": commits, "summary": summary(results), "results": results})
    for line in summary(results):
        print(line)
    return int(any(r["before"].get("said") != r["after"].get("said") for r in results.values()))


def batches(args: argparse.Namespace) -> list[list[dict[str, Any]]]:
    """Jobs, those of one process together."""
    found: list[list[dict[str, Any]]] = []
    if args.corpus:
        corpus = import_module("tests.spellings")
        names = [name for name in (*corpus.POSITIVE, *corpus.NEGATIVE) if not args.only or name in args.only]
        jobs = [{"name": name, "convert": []} for name in names]
        found += [jobs[i : i + BATCH] for i in range(0, len(jobs), BATCH)]
    if args.models:
        for name, config in json.loads(args.models.read_text()).items():
            if not args.only or name in args.only:
                config = {"model_type": name, **config}
                found.append([{"name": name, "config": config, "convert": [False, True]}])
    return found


def run(place: Path, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results of a process that uses the checkout at `place`."""
    env = {**os.environ, "PYTHONPATH": str(place), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(WORKER)], input=json.dumps(jobs), env=env, cwd=place, capture_output=True, text=True
    )
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"name"')]
    late = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return found + [{"name": job["name"], "error": late} for job in jobs[len(found) :]]


def add(known: dict[str, Any], found: dict[str, Any]) -> None:
    """Adds one run's result to those before: the smallest time of each step, and what was said last."""
    for key, value in found.items():
        known[key] = min(known.get(key, value), value) if key in STEPS else value


def summary(results: dict[str, dict[str, Any]]) -> list[str]:
    """Lines for people: how many agree, which do not, and the times of both."""
    both = {name: r for name, r in results.items() if len(r) == 2}
    equal = [name for name, r in both.items() if r["before"].get("said") == r["after"].get("said") is not None]
    lines = [f"{len(equal)} of {len(both)} reports are equal"]
    lines += [f"differs: {name}" for name in both if name not in equal]
    for step in STEPS:
        timed = [r for r in both.values() if step in r["before"] and step in r["after"]]
        if timed:
            before, after = (sum(r[side][step] for r in timed) for side in ("before", "after"))
            lines.append(
                f"{step}: {before:.1f} s before, {after:.1f} s after ({after / before:.2f}), CPU time of {len(timed)}"
            )
    return lines


def commit(place: Path) -> str:
    """The commit of a checkout."""
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=place, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
