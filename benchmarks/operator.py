"""``llcompile bench operator``: how the operator's time and memory grow, and how it compares with transformers' code.

On a GPU the peers are others, and so is the command (:mod:`benchmarks.cuda`).
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.process import in_process
from benchmarks.record import environment, results_file, write
from llcompile.errors import SpecError

FAMILIES = [(decay, correction) for correction in ("none", "delta") for decay in ("none", "scalar", "channel")]
PEERS = {("scalar", "delta"): "torch_chunk_gated_delta_rule", ("scalar", "none"): "mamba2_chunk_scan"}
LENGTHS = [1024, 2048, 4096, 8192, 16384, 32768, 65536]
PEER_LENGTHS = [4096, 16384]


@dataclass(frozen=True)
class Job:
    """One thing to measure."""

    runs: str  # "llcompile", or a peer's function
    decay: str
    correction: str
    weights: bool
    backward: bool
    length: int
    device: str = "cpu"
    compiled: bool = False
    heads: int = 4
    dim: int = 64
    repeats: int = 5

    @property
    def title(self) -> str:
        """One line for people."""
        kind = "log-linear" if self.weights else "linear"
        name = f"{kind} {self.decay}/{self.correction}" if self.runs == "llcompile" else self.runs
        return f"{name}{' (Inductor)' if self.compiled else ''}, {'fwd+bwd' if self.backward else 'fwd'}"


def add_parser(kinds: Any) -> None:
    """Add ``operator`` to the measurements."""
    parser = kinds.add_parser(
        "operator", help="time the operator, on a CPU against transformers, on a GPU against FLA and SDPA"
    )
    parser.add_argument("--device", default="cpu", help="device to run on (default: cpu)")
    parser.add_argument("--quick", action="store_true", help="run small sizes for a few seconds as a smoke test")
    parser.add_argument("--compile-limit", type=float, default=300.0, help="time limit in seconds for compiling a peer")
    parser.add_argument("--lengths", type=int, nargs="+", help="lengths (default: 1k to 64k, on a GPU 2k to 256k)")
    parser.add_argument(
        "--families", nargs="+", metavar="DECAY/CORRECTION", help="measure only these families, such as scalar/delta"
    )
    parser.add_argument("--repeats", type=int, default=5, help="repeats of each measurement; the fastest counts")
    parser.add_argument(
        "--output", type=Path, help="JSON file (default: benchmarks/results/operator-<device>-<date>.json)"
    )
    parser.add_argument(
        "--against",
        metavar="PEERS",
        help="cuda: peers or libraries to compare with, such as fla,sdpa, or none (default: all that are installed)",
    )
    parser.add_argument(
        "--minutes", type=float, default=10.0, help="cuda: time limit; the most important cases run first (default: 10)"
    )
    parser.set_defaults(measure=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print tables, write JSON."""
    if args.device.startswith("cuda"):
        return int(importlib.import_module("benchmarks.cuda.command").run(args))
    if args.against is not None:
        raise SpecError("--against names peers on a GPU: add --device cuda (on a CPU, transformers' code is the peer)")
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console()
    all_series = _series(args)
    results: list[dict[str, Any]] = []
    columns = (TextColumn("{task.description:60}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    kind = f"{args.device}{'-quick' if args.quick else ''}"
    path = args.output or results_file(f"operator-{kind}")
    record: dict[str, Any] = {}
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("measuring", total=len(all_series))
        for series in all_series:
            progress.update(task, description=series[0].title)
            results += _measure(series, args.compile_limit)
            record = _record(args, results)
            write(path, record)  # after each series: an interrupted run leaves what it has
            progress.advance(task)
    _print(console, record)
    console.print(f"written to {path}")
    return 1 if any("error" in r and r["job"]["runs"] == "llcompile" for r in results) else 0


def _record(args: argparse.Namespace, results: list[dict[str, Any]]) -> dict[str, Any]:
    found = {"exponents": exponents(results), "peers": comparisons(results), "results": results}
    return {**environment(args.device), "quick": args.quick, **found}


def _series(args: argparse.Namespace) -> list[list[Job]]:
    """Jobs, grouped by the process that runs them: one for all lengths, but one each where something is compiled."""
    lengths = [256] if args.quick else args.lengths or LENGTHS
    families = [("scalar", "none"), ("scalar", "delta")] if args.quick else FAMILIES
    if args.families:
        families = [f for f in FAMILIES if "/".join(f) in args.families]
    common = {"device": args.device, "repeats": 2 if args.quick else args.repeats}
    series = [
        [Job("llcompile", decay, correction, weights, backward, length, **common) for length in lengths]
        for decay, correction in families
        for weights in (False, True)
        for backward in (False, True)
    ]
    if importlib.util.find_spec("transformers") is None or args.quick:
        return series
    for (decay, correction), name in PEERS.items():
        if (decay, correction) not in families:
            continue
        for backward in (False, True):
            eager = [
                Job(name, decay, correction, False, backward, length, **common)
                for length in PEER_LENGTHS
                if length in lengths
            ]
            series += [eager, *([replace(job, compiled=True)] for job in eager)]
    return series


def _measure(series: list[Job], compile_limit: float) -> list[dict[str, Any]]:
    """Run jobs in a process of their own; what had no result when it ended gets an error instead."""
    compiled = series[0].compiled
    limit = compile_limit + 60 if compiled else 1800.0
    late = f"compilation given up after {compile_limit:.0f} s" if compiled else f"no result in {limit:.0f} s"
    return in_process("benchmarks.operator_worker", [asdict(job) for job in series], limit, late)


def exponents(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Slope of log time over log length from 4k on, for every family, of wall and of CPU time."""
    series: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for r in results:
        job = r["job"]
        if job["runs"] == "llcompile" and "seconds" in r and job["length"] >= 4096:
            key = (job["decay"], job["correction"], job["weights"], job["backward"])
            series.setdefault(key, []).append(r)
    found = []
    for (decay, correction, weights, backward), points in series.items():
        if len(points) > 1:
            names = {"decay": decay, "correction": correction, "weights": weights, "backward": backward}
            found.append({**names, "exponent": slope(points, "seconds"), "cpu_exponent": slope(points, "cpu_seconds")})
    return found


def slope(points: list[dict[str, Any]], field: str) -> float:
    """The exponent of a field's growth with the length, by least squares on logarithms."""
    xs = [math.log(r["job"]["length"]) for r in points]
    ys = [math.log(max(r[field], 1e-9)) for r in points]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    above = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    return round(above / sum((x - mean_x) ** 2 for x in xs), 3)


def comparisons(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours against the faster of a peer's eager and compiled forms, on the same operands."""
    rows = []
    ours = [r for r in results if r["job"]["runs"] == "llcompile" and "seconds" in r]
    peers = [r for r in results if r["job"]["runs"] != "llcompile"]
    for own in ours:
        job = own["job"]
        same = [r for r in peers if all(r["job"][x] == job[x] for x in ("decay", "correction", "backward", "length"))]
        timed = [r for r in same if "seconds" in r]
        if not timed:
            continue
        best = min(timed, key=lambda r: r["seconds"])
        rows.append({
            "peer": best["job"]["runs"], "form": "Inductor" if best["job"]["compiled"] else "eager",
            "weights": job["weights"], "backward": job["backward"], "length": job["length"],
            "seconds": own["seconds"], "peer_seconds": best["seconds"],
            "times_faster": round(best["seconds"] / own["seconds"], 2),
            "cpu_times_less": round(best["cpu_seconds"] / max(own["cpu_seconds"], 1e-9), 2),
            "peak_mib": own["peak_mib"], "peer_peak_mib": min(r["peak_mib"] for r in timed),
            "notes": [f"{'Inductor' if r['job']['compiled'] else 'eager'}: {r['error']}" for r in same if "error" in r],
        })  # fmt: skip
    return rows


def _print(console: Any, record: dict[str, Any]) -> None:
    from rich.table import Table

    lengths = sorted({r["job"]["length"] for r in record["results"] if r["job"]["runs"] == "llcompile"})
    table = Table(title="time in ms (peak MiB) by length", caption=f"{record['machine']}, {record['date'][:16]}")
    for name in ("decay", "correction", "operator", "pass", *map(str, lengths), "exponent"):
        table.add_column(name, justify="left" if name.isalpha() and name != "exponent" else "right")
    slopes = {tuple(e[k] for k in ("decay", "correction", "weights", "backward")): e for e in record["exponents"]}
    cells: dict[tuple[Any, ...], dict[int, str]] = {}
    for r in record["results"]:
        job = r["job"]
        if job["runs"] == "llcompile":
            key = (job["decay"], job["correction"], job["weights"], job["backward"])
            text = f"{r['seconds'] * 1e3:.1f} ({r['peak_mib']:.0f})" if "seconds" in r else r["error"][:20]
            cells.setdefault(key, {})[job["length"]] = text
    for key, row in cells.items():
        slope = str(slopes[key]["exponent"]) if key in slopes else "-"
        words = (key[0], key[1], "log-linear" if key[2] else "linear", "fwd+bwd" if key[3] else "fwd")
        table.add_row(*words, *(row.get(n, "-") for n in lengths), slope)
    console.print(table)
    if record["peers"]:
        console.print(_peer_table(record["peers"]))


def _peer_table(rows: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(title="against transformers' own code, the faster of eager and Inductor")
    for name in (
        "peer",
        "form",
        "operator",
        "pass",
        "T",
        "ours ms",
        "peer ms",
        "times faster",
        "CPU time",
        "ours MiB",
        "peer MiB",
    ):
        table.add_column(name, justify="left" if name in ("peer", "form", "operator", "pass") else "right")
    for r in rows:
        words = (
            r["peer"],
            r["form"],
            "log-linear" if r["weights"] else "linear",
            "fwd+bwd" if r["backward"] else "fwd",
        )
        times = (
            f"{r['seconds'] * 1e3:.1f}",
            f"{r['peer_seconds'] * 1e3:.1f}",
            f"{r['times_faster']}",
            f"{r['cpu_times_less']}",
        )
        table.add_row(*words, str(r["length"]), *times, f"{r['peak_mib']:.0f}", f"{r['peer_peak_mib']:.0f}")
    notes = sorted({f"{r['peer']} T={r['length']}: {note}" for r in rows for note in r["notes"]})
    table.caption = "\n".join(notes)
    return table
