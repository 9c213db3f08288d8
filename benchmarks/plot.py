"""``llcompile bench plot FILE.json --out F.png``: draw what a measurement wrote to a file."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

from llcompile.errors import BenchError

# The commands whose results can be drawn, and the module whose `holds(result)` knows one of theirs and whose
# `draw(record, out)` draws them.
DRAWN = {
    "operator --device cuda": "benchmarks.cuda.plot",
    "operator --device cpu": "benchmarks.operator_plot",
    "rewrite": "benchmarks.rewrite_plot",
}


def add_parser(subparsers: Any) -> None:
    """Add ``plot`` to ``llcompile bench``."""
    known = ", ".join(f"'{command}'" for command in DRAWN)
    parser = subparsers.add_parser("plot", help=f"draw time against length from results of {known}")
    parser.add_argument("file", type=Path, metavar="FILE.json", help=f"results of {known}")
    parser.add_argument("--out", type=Path, required=True, help="picture to write: .png, .svg or .pdf")
    parser.set_defaults(measure=run)


def run(args: argparse.Namespace) -> int:
    """Draw; raises BenchError for a file without results that can be drawn, or without matplotlib."""
    record = _read(args.file)
    results = record.get("results", ()) if isinstance(record, dict) else ()
    for name in DRAWN.values():
        module = importlib.import_module(name)
        if any(module.holds(result) for result in results):
            _need_matplotlib()
            module.draw(record, args.out)
            print(f"written to {args.out}")
            return 0
    known = " or ".join(f"'llcompile bench {command}'" for command in DRAWN)
    raise BenchError(f"{args.file} holds no times of {known}")


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise BenchError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise BenchError(f"{path} is not JSON: {error}") from error


def _need_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise BenchError("plots need matplotlib: pip install 'llcompile[plot]', or pip install matplotlib") from error
