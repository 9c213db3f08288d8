"""Time hand-written quadratic linear attention before and after the rewrite.

The code computes a score for each pair of tokens. It is measured as written (with ``--inductor`` also compiled by
Inductor alone) and under ``torch.compile(model, backend="loglinear")``, with and without level weights. Each
measurement runs in its own process. The first call, which compiles, is reported separately with the share of
recognition.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.operator_figures import slope
from benchmarks.process import in_process
from benchmarks.record import environment, results_file, write
from llcompile.arguments import at_least, positive

LENGTHS = [1024, 2048, 4096, 8192, 16384]
FIT_FROM = 4096  # below, what does not grow with the length counts
FORMS = {
    "eager": "as written",
    "inductor": "as written, Inductor",
    "loglinear:none": "linear operator",
    "loglinear": "log-linear operator",
}
DECAYS = ("none", "scalar")


@dataclass(frozen=True)
class Job:
    """One thing to measure."""

    decay: str
    form: str
    backward: bool
    length: int
    heads: int
    dim: int
    repeats: int
    threads: int | None


def add_parser(subparsers: Any) -> None:
    """Add ``bench rewrite`` to the command line."""
    parser = subparsers.add_parser(
        "rewrite", help="time a hand-written mixer before and after the rewrite", description=__doc__
    )
    parser.add_argument("--lengths", type=at_least(1), nargs="+", default=LENGTHS, help="lengths (default: 1k to 16k)")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="file for the results (default: in benchmarks/results/)"
    )
    parser.add_argument("--threads", type=at_least(1), metavar="N", help="torch threads (default: set by torch)")
    parser.add_argument(
        "--inductor", action="store_true", help="also measure the code as written, compiled by Inductor alone"
    )
    parser.add_argument("--decays", nargs="+", choices=DECAYS, default=DECAYS, help="decays to measure (default: both)")
    parser.add_argument("--heads", type=at_least(1), default=2, help="heads (default 2)")
    parser.add_argument("--dim", type=at_least(1), default=64, help="width of a head (default 64)")
    parser.add_argument("--repeats", type=at_least(1), default=3, help="repeats of each; the fastest counts")
    parser.add_argument("--limit", type=positive, default=600.0, help="time limit in seconds for a measurement")
    parser.set_defaults(measure=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print tables, write JSON."""
    from rich.console import Console
    from rich.progress import track

    console, path = Console(), args.json or results_file("rewrite-cpu")
    results: list[dict[str, Any]] = []
    record: dict[str, Any] = {}
    for job in track(_jobs(args), "measuring", console=console):
        late = f"no result in {args.limit:.0f} s"
        results += in_process("benchmarks.rewrite_worker", [asdict(job)], args.limit, late)
        record = {**environment("cpu"), "exponents": exponents(results), "results": results}
        record["threads"] = args.threads or record["threads"]
        write(path, record)  # after each: an interrupted run leaves what it has
    for table in tables(record):
        console.print(table)
    console.print(f"written to {path}")
    return int(any(r.get("error", "does not fit") != "does not fit" for r in results))


def _jobs(args: argparse.Namespace) -> list[Job]:
    forms = [form for form in FORMS if form != "inductor" or args.inductor]
    sizes = (args.heads, args.dim, args.repeats, args.threads)
    return [
        Job(decay, form, backward, length, *sizes)
        for decay in args.decays
        for form in forms
        for backward in (False, True)
        for length in args.lengths
    ]


def exponents(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How time grows with the length, from 4k on, for each line of the table."""
    found = []
    for (decay, form, backward), points in _lines(results).items():
        timed = [r for r in points if "seconds" in r and r["job"]["length"] >= FIT_FROM]
        if len(timed) > 1:
            names = {"decay": decay, "form": form, "backward": backward}
            found.append({**names, "exponent": slope(timed, "seconds"), "cpu_exponent": slope(timed, "cpu_seconds")})
    return found


def _lines(results: list[dict[str, Any]]) -> dict[tuple[str, str, bool], list[dict[str, Any]]]:
    lines: dict[tuple[str, str, bool], list[dict[str, Any]]] = {}
    for r in results:
        lines.setdefault((r["job"]["decay"], r["job"]["form"], r["job"]["backward"]), []).append(r)
    return lines


def tables(record: dict[str, Any]) -> list[Any]:
    """Times with peak memory, then what the first call takes."""
    lengths = sorted({r["job"]["length"] for r in record["results"]})
    slopes = {
        (e["decay"], e["form"], e["backward"]): f"{e['exponent']:.2f} ({e['cpu_exponent']:.2f})"
        for e in record["exponents"]
    }
    warm = _table("ms (peak MiB) by length", lengths, f"{record['machine']}, {record['date'][:16]}", "exponent (CPU)")
    cold = _table("first call: s, of them recognition (peak MiB) by length", lengths, "")
    for key, points in _lines(record["results"]).items():
        names = (key[0], FORMS[key[1]], "fwd+bwd" if key[2] else "fwd")
        by_length = {r["job"]["length"]: r for r in points}
        row = [by_length.get(n, {"error": "-"}) for n in lengths]
        warm.add_row(*names, *map(_warm, row), slopes.get(key, "-"))
        if key[1] != "eager":
            cold.add_row(*names, *map(_cold, row))
    return [warm, cold] if cold.row_count else [warm]


def _table(title: str, lengths: list[int], caption: str, *more: str) -> Any:
    from rich.table import Table

    table = Table(title=title, caption=caption)
    for name in ("decay", "form", "pass"):
        table.add_column(name)
    for name in (*map(str, lengths), *more):
        table.add_column(name, justify="right")
    return table


def _warm(r: dict[str, Any]) -> str:
    return str(r["error"])[:40] if "error" in r else f"{r['seconds'] * 1e3:.0f} ({r['peak_mib']:.0f})"


def _cold(r: dict[str, Any]) -> str:
    if "error" in r:
        return str(r["error"])[:40]
    share = f", {r['recognition_seconds']:.2f}" if "recognition_seconds" in r else ""
    return f"{r['compile_seconds']:.1f}{share} ({r['compile_peak_mib']:.0f})"
