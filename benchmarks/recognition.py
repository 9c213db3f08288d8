"""Time recognition while a model compiles, and compare with plain Inductor.

The table shows the seconds of llcompile's passes up to the rewrite, and the seconds in which plain Inductor compiles
the model (first call minus second call, with nothing cached). The first compiled call runs the passes twice, the second
time with the new level weights; both count.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.process import in_process
from benchmarks.record import environment, results_file, write
from llcompile.arguments import at_least, positive
from llcompile.errors import SpecError

OWN = ("quadratic", "token loop")


@dataclass(frozen=True)
class Job:
    """One thing to measure. `config` is that of a model of transformers: {"class": ..., "kwargs": {...}}."""

    model: str
    form: str  # a backend
    length: int
    threads: int | None
    config: dict[str, Any] | None = None


def add_parser(subparsers: Any) -> None:
    """Add ``bench recognition`` to the command line."""
    parser = subparsers.add_parser("recognition", help="time recognition while a model compiles", description=__doc__)
    parser.add_argument(
        "--models",
        type=Path,
        metavar="FILE",
        help='JSON file with transformers models: {model_type: {"class": "AutoModelForCausalLM", "kwargs": {...}}}',
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="measure only these models")
    parser.add_argument(
        "--length", type=at_least(1), default=64, help="tokens in the input of a model from the file (default 64)"
    )
    parser.add_argument("--loop", type=at_least(1), default=256, help="length of the hand-written mixers (default 256)")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="file for the results (default: in benchmarks/results/)"
    )
    parser.add_argument("--threads", type=at_least(1), metavar="N", help="torch threads (default: set by torch)")
    parser.add_argument("--limit", type=positive, default=600.0, help="time limit in seconds for a compilation")
    parser.set_defaults(measure=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print a table, write JSON."""
    from rich.console import Console
    from rich.progress import track

    console, path = Console(), args.json or results_file("recognition-cpu")
    results: list[dict[str, Any]] = []
    record: dict[str, Any] = {}
    for job in track(_jobs(args), "measuring", console=console):
        late = f"no result in {args.limit:.0f} s"
        results += in_process("benchmarks.rewrite_worker", [asdict(job)], args.limit, late)
        record = {**environment("cpu"), "summary": summary(results), "results": results}
        record["threads"] = args.threads or record["threads"]
        write(path, record)
    console.print(table(record))
    console.print(f"written to {path}")
    return int(any("error" in r and r["job"]["form"] == "loglinear" for r in results))


def _jobs(args: argparse.Namespace) -> list[Job]:
    models: dict[str, tuple[int, dict[str, Any] | None]] = dict.fromkeys(OWN, (args.loop, None))
    if args.models is not None:
        try:
            models |= {name: (args.length, config) for name, config in json.loads(args.models.read_text()).items()}
        except (OSError, ValueError, AttributeError) as error:
            raise SpecError(f"cannot read {args.models}: {error}") from error
    names = args.only or list(models)
    unknown = [name for name in names if name not in models]
    if unknown:
        raise SpecError(f"--only {unknown[0]}: expected some of {', '.join(models)}")
    return [
        Job(name, form, models[name][0], args.threads, models[name][1])
        for name in names
        for form in ("loglinear", "inductor")
    ]


def summary(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a model: recognition, plain Inductor, and their ratio where both are known."""
    rows: dict[str, dict[str, Any]] = {}
    for r in results:
        row = rows.setdefault(r["job"]["model"], {"model": r["job"]["model"], "length": r["job"]["length"]})
        if "error" in r:
            row.setdefault("notes", []).append(f"{r['job']['form']}: {r['error']}")
        elif r["job"]["form"] == "inductor":
            row["inductor_seconds"] = r["compile_seconds"] - r["seconds"]
        else:
            row |= {k: r[k] for k in ("recognition_seconds", "converted", "declined", "untouched")}
    for row in rows.values():
        if "recognition_seconds" in row and "inductor_seconds" in row:
            row["ratio"] = round(row["recognition_seconds"] / row["inductor_seconds"], 4)
    return list(rows.values())


def table(record: dict[str, Any]) -> Any:
    """The summary for people."""
    from rich.table import Table

    made = Table(title="recognition", caption=f"{record['machine']}, {record['date'][:16]}")
    for name in ("model", "T", "ours s", "Inductor s", "share", "converted", "declined", "untouched", ""):
        made.add_column(name, justify="left" if name in ("model", "") else "right")
    for row in record["summary"]:
        seconds = [f"{row[k]:.2f}" if k in row else "-" for k in ("recognition_seconds", "inductor_seconds")]
        share = f"{100 * row['ratio']:.1f} %" if "ratio" in row else "-"
        counts = [str(row.get(k, "-")) for k in ("converted", "declined", "untouched")]
        made.add_row(row["model"], str(row["length"]), *seconds, share, *counts, "; ".join(row.get("notes", ())))
    return made
