"""``llcompile bench operator``: how the operator's time and memory grow, and how it compares with transformers' code.

On a CPU the targets of the C++ kernels stand beside what was measured. On a GPU the peers are others, and so is the
command (:mod:`benchmarks.cuda`).
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import importlib.util
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.operator_figures import comparisons, exponents, figures
from benchmarks.operator_plan import DTYPES, FAMILIES, LENGTHS, QUICK_LENGTH, Job, Plan, Series
from benchmarks.process import in_process
from benchmarks.record import environment, load, results_file, write
from llcompile.arguments import at_least, positive
from llcompile.errors import SpecError

# Seconds kept for the tables and the picture, and those below which a process is not worth its start.
RESERVE, START = 15.0, 10.0
AHEAD_LIMIT = 600.0


def add_parser(kinds: Any) -> None:
    """Add ``operator`` to the measurements."""
    parser = kinds.add_parser(
        "operator", help="time the operator, on a CPU against transformers, on a GPU against FLA and SDPA"
    )
    parser.add_argument("--device", default="cpu", help="device to run on (default: cpu)")
    parser.add_argument("--quick", action="store_true", help="run small sizes for a few seconds as a smoke test")
    parser.add_argument(
        "--compile-limit", type=positive, default=300.0, help="time limit in seconds for compiling a peer"
    )
    parser.add_argument(
        "--lengths", type=at_least(1), nargs="+", help="lengths (default: 1k to 64k, on a GPU 2k to 256k)"
    )
    parser.add_argument(
        "--families", nargs="+", metavar="DECAY/CORRECTION", help="measure only these families, such as scalar/delta"
    )
    parser.add_argument(
        "--repeats", type=at_least(1), default=5, help="repeats of each measurement; on a CPU fewer of slow ones"
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="cpu: dtypes of operands (default: both)")
    parser.add_argument("--threads", type=at_least(1), nargs="+", help="cpu: numbers of threads (default: 1 2)")
    parser.add_argument(
        "--kernels",
        nargs="+",
        help="cpu: kernels to compare, as in LLCOMPILE_KERNELS; targets are for the first (default: cpp aten)",
    )
    parser.add_argument(
        "--output", type=Path, help="JSON file (default: benchmarks/results/operator-<device>-<date>.json)"
    )
    parser.add_argument(
        "--against",
        metavar="PEERS",
        help="cuda: peers or libraries to compare with, such as fla,sdpa, or none (default: all that are installed)",
    )
    parser.add_argument(
        "--minutes", type=positive, default=10.0, help="time limit; the most important cases run first (default: 10)"
    )
    parser.set_defaults(measure=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print tables, write JSON and the picture; 1 if any of ours failed.

    Raises SpecError for what the command line cannot mean.
    """
    if args.device.startswith("cuda"):
        return int(importlib.import_module("benchmarks.cuda.command").run(args))
    if args.device != "cpu":
        raise SpecError(f"--device {args.device}: expected cpu or cuda")
    if args.against is not None:
        raise SpecError("--against names peers on a GPU: add --device cuda (on a CPU, transformers' code is the peer)")
    from rich.console import Console

    from benchmarks.operator_plot import picture
    from benchmarks.operator_show import show

    plan = planned(args)
    path = args.output or results_file(f"operator-{args.device}{'-quick' if args.quick else ''}")
    # A log file is no terminal: wide enough for a table's row in one line.
    console = Console(width=None if Console().is_terminal else 180)
    record = measure(args, plan, console, lambda record: write(path, record))
    show(console, record)
    console.print(f"written to {path}" + picture(record, path.with_suffix(".png")))
    own = [r for r in record["results"] if r["job"]["runs"] == "llcompile"]
    return int(not own or any("error" in r for r in own))


def planned(args: argparse.Namespace) -> Plan:
    """What the command line asks for; raises SpecError for a family, size, number or kernels that no run can have."""
    from llcompile.kernels.choice import CHOICES, VARIABLE

    names = ["/".join(family) for family in FAMILIES]
    for option, given, known in (("--families", args.families, names), ("--kernels", args.kernels, list(CHOICES))):
        for name in [name for name in given or () if name not in known]:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise SpecError(f"{option}: {name!r} is unknown; did you mean {near!r}? Known: {', '.join(known)}")
    asked = os.environ.get(VARIABLE) or "auto"
    kernels = args.kernels or (["cpp", "aten"] if asked == "auto" else [asked])
    some = [("scalar", "none"), ("scalar", "delta")] if args.quick else FAMILIES
    chosen = [family for family in FAMILIES if "/".join(family) in args.families] if args.families else some
    dtypes = args.dtypes or (DTYPES[:1] if args.quick else DTYPES)
    threads = args.threads or ([1] if args.quick else [1, 2])
    return Plan(
        lengths=[QUICK_LENGTH] if args.quick else sorted(set(args.lengths or LENGTHS)),
        families=chosen,
        settings=[(dtype, number) for number in dict.fromkeys(threads) for dtype in dict.fromkeys(dtypes)],
        kernels=list(dict.fromkeys(kernels)),
        repeats=2 if args.quick else args.repeats,
        device=args.device,
        peers=importlib.util.find_spec("transformers") is not None,
        quick=args.quick,
    )


def measure(
    args: argparse.Namespace,
    plan: Plan,
    console: Any,
    keep: Callable[[dict[str, Any]], None],
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """The whole run; ``keep`` is handed the record after every process, so that nothing is lost."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    deadline = clock() + args.minutes * 60 - RESERVE
    record: dict[str, Any] = {"quick": args.quick, "minutes": args.minutes, "kernels": plan.kernels}
    record |= {"load": {"before": load()}, "results": [], "left_out": []}
    all_series = plan.series()
    columns = (TextColumn("{task.description:70}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("compiling C++ kernels, once for this machine", total=len(all_series))
        _compile_ahead(plan)
        for number, series in enumerate(all_series):
            progress.update(task, description=series[0].title)
            if not console.is_terminal:  # where there is no bar
                console.print(series[0].title, markup=False)
            _add(record, series, number, args.compile_limit, deadline - clock())
            _conclude(record, args.device)
            keep(record)
            progress.advance(task)
    return record


def _compile_ahead(plan: Plan) -> None:
    """Run each family once on a few tokens: what is generated for it is compiled now, beside no measurement."""
    own = [form for form in plan.kernels if form != "aten"]
    jobs = [
        Job("llcompile", *family, False, False, 16, device=plan.device, repeats=1, kernels=form)
        for family in plan.families
        for form in own
    ]
    if jobs:
        in_process("benchmarks.operator_worker", [asdict(job) for job in jobs], AHEAD_LIMIT, "late")


def _add(record: dict[str, Any], series: Series, process: int, compile_limit: float, seconds: float) -> None:
    """Run jobs in a process of their own, and add their results, or their titles to what was left out."""
    reason = _given_up(record["results"], series[0])
    if reason is None and seconds < START:
        record["left_out"] += [job.title for job in series]
        return
    if reason is not None:
        record["results"].append({"job": asdict(series[0]), "error": reason, **_place(series[0], process)})
        return
    compiled = series[0].compiled
    limit = min(compile_limit + START, seconds) if compiled else seconds
    cut = not compiled or limit == seconds
    late = "late" if cut else f"compilation given up after {compile_limit:.0f} s"
    jobs = [asdict(job) for job in series]
    found = in_process("benchmarks.operator_worker", jobs, limit, late, threads=series[0].threads)
    for job, r in zip(series, found, strict=True):
        if r.get("error") == "late":  # cut off by the end, which is nobody's failure
            record["left_out"].append(job.title)
        elif "error" not in r or job.runs != "llcompile" or not compiled:
            record["results"].append({**r, **_place(job, process)})


def _place(job: Job, process: int) -> dict[str, Any]:
    """Times are compared within a process."""
    return {"title": job.title, "process": process}


def _given_up(results: Iterable[dict[str, Any]], job: Job) -> str | None:
    """Why a compilation is not worth its time: that of less, a shorter sequence or the forward pass, was given up."""
    if not job.compiled:
        return None
    for r in results:
        other = r["job"]
        less = other["runs"] == job.runs and other["compiled"] and other["backward"] <= job.backward
        if less and "compilation given up" in r.get("error", ""):
            return f"compilation given up, as {'fwd+bwd' if other['backward'] else 'fwd'} at {other['length']} was"
    return None


def _conclude(record: dict[str, Any], device: str) -> None:
    """Bring what follows from the results up to date."""
    results = record["results"]
    record |= environment(device)
    record["load"]["after"] = load()
    record["exponents"] = exponents(results)
    record["peers"] = [row for form in record["kernels"] for row in comparisons(results, form)]
    record["figures"] = figures(results, record["kernels"][0])
