"""The command line: `python -m benchmarks.evidence NAME --out DIR`."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from benchmarks import evidence
from benchmarks.evidence import pool
from llcompile.arguments import at_least, positive

EXPERIMENTS = ("recall", "typeseg", "language")


def main(given: list[str] | None = None) -> int:
    """Run an experiment, or show what was found."""
    parser = argparse.ArgumentParser(description=evidence.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=(*EXPERIMENTS, "show"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/evidence"), help="folder of the results")
    parser.add_argument("--minutes", type=positive, default=60.0, help="stop after so many (default: 60)")
    parser.add_argument("--workers", type=at_least(1), default=2, help="processes at once (default: 2)")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--small", action="store_true", help="sizes for two cores: they try the command, no more")
    args = parser.parse_args(given)
    if args.name == "show":
        importlib.import_module("benchmarks.evidence.show").show(args.out)
        return 0
    order = pool.Order(args.name, args.out, args.minutes, args.workers, args.device, args.small)
    shares = importlib.import_module(f"benchmarks.evidence.{args.name}").shares(args.small)
    return min(1, pool.run(order, shares))


if __name__ == "__main__":
    raise SystemExit(main())
