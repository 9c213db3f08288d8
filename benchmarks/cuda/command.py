"""``llcompile bench operator --device cuda``: from the command line to a file of results and tables."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from benchmarks.cuda.budget import Answer, run_plan
from benchmarks.cuda.cases import LENGTHS, OWN, QUICK, ROUNDS, Case, plan
from benchmarks.cuda.crew import Helper
from benchmarks.cuda.goals import evaluate
from benchmarks.cuda.peers import PEERS, Peer, chosen
from benchmarks.cuda.show import line, show
from benchmarks.cuda.warm import compile_ahead, helper_for, kinds
from benchmarks.operator_plan import FAMILIES
from benchmarks.record import environment, results_file, write
from llcompile.errors import BenchError, SpecError

# The part of the time that compiling ahead may take, and how many kinds of cases it takes on: those that the first
# rounds need, since an hour of compilation for the last ones is no use.
WARM_SHARE, WARM_KINDS = 0.35, 96
# Seconds kept for the tables and for the last case to end.
RESERVE = 5.0
# Seconds for the question what the chip does.
CHIP_LIMIT = 120.0


def run(args: argparse.Namespace) -> int:
    """Measure, print, write JSON; 1 if any of ours failed.

    Raises SpecError for what the command line cannot mean, as an unknown peer, and BenchError without a CUDA device.
    """
    peers = chosen(args.against)
    check(args)
    need_device(args.device)
    path = args.output or results_file(f"operator-cuda{'-quick' if args.quick else ''}")
    with crew(args.device) as helper:
        record = measure(args, peers, helper, lambda record: write(path, record))
    show(record)
    print(f"written to {path}")
    ours = [r for r in record["results"] if r["case"]["runs"] == "llcompile"]
    return int(not ours or any("error" in r for r in ours))


def check(args: argparse.Namespace) -> None:
    """Raise SpecError for a family, a length or a number of minutes that no run can have."""
    known = ["/".join(family) for family in FAMILIES]
    for name in set(args.families or ()) - set(known):
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise SpecError(f"--families: {name!r} is not a family; did you mean {near!r}? Known: {', '.join(known)}")
    if odd := sorted(set(args.lengths or ()) - set(LENGTHS)):
        raise SpecError(f"--lengths: on a GPU, lengths are powers of two from {LENGTHS[0]} to {LENGTHS[-1]}, got {odd}")
    if args.minutes <= 0:
        raise SpecError(f"--minutes must be more than 0, got {args.minutes}")


def need_device(device: str) -> None:
    """Raise BenchError unless ``device`` is there."""
    import torch

    if not torch.cuda.is_available():
        raise BenchError(
            f"--device {device}: PyTorch {torch.__version__} sees no CUDA device here. Run this where there is one "
            "(benchmarks/on_gpu.sh sets up a bare machine), or measure this machine's CPU with "
            "'llcompile bench operator --device cpu'"
        )


@contextlib.contextmanager
def crew(device: str) -> Iterator[Helper]:
    """The helper that measures, ended in any case."""
    helper = Helper(device)
    try:
        yield helper
    finally:
        helper.stop()


def measure(
    args: argparse.Namespace,
    peers: list[Peer],
    helper: Helper,
    keep: Callable[[dict[str, Any]], None],
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """The whole run; ``keep`` is handed the record after every case."""
    deadline = clock() + args.minutes * 60 - RESERVE
    record: dict[str, Any] = {**environment(args.device), "quick": args.quick, "minutes": args.minutes}
    record["kernels"] = os.environ.get("LLCOMPILE_KERNELS", "triton")
    record["autotune"] = os.environ.get("LLCOMPILE_AUTOTUNE", "0")
    record["chip"] = chip = helper.ask({"what": "chip"}, CHIP_LIMIT)
    record["peers"] = found = [p for p in _presence(helper) if p["name"] in {peer.name for peer in peers}]
    for about in (_chip_line(chip), *(_peer_line(p) for p in found)):
        print(about, flush=True)
    cases = _plan(args, [p for p in peers if any(p.name == q["name"] and "absent" not in q for q in found)])
    if not args.quick:
        record["compiled_ahead"] = _warm(args, cases, (deadline - clock()) * WARM_SHARE)

    def after_each(results: list[Answer], left_out: list[str]) -> None:
        record.update(results=results, left_out=left_out, goals=evaluate(results))
        if results and not left_out:
            print(line(results[-1]), flush=True)
        keep(record)

    def one(case: Case, seconds: float) -> Answer:
        return helper.ask({"what": "case", "case": asdict(case)}, seconds)

    ceilings = (chip["bandwidth"], chip["rate"]) if "rate" in chip else None
    run_plan(cases, one, deadline, after_each, ceilings, clock)
    return record


def _plan(args: argparse.Namespace, peers: list[Peer]) -> list[Case]:
    runners = [*OWN, *(p.runner for p in peers)]
    families = None if args.families is None else [_family(text) for text in args.families]
    return plan(runners, QUICK if args.quick else ROUNDS, args.lengths, families)


def _family(text: str) -> tuple[str, str]:
    decay, _, correction = text.partition("/")
    return decay, correction


def _presence(helper: Helper) -> list[dict[str, str]]:
    answer = helper.ask({"what": "peers"}, CHIP_LIMIT)
    if "peers" in answer:
        return list(answer["peers"])
    return [{"name": p.name, "absent": answer["error"]} for p in PEERS]


def _warm(args: argparse.Namespace, cases: list[Case], seconds: float) -> str:
    """Compile ahead on all cores but two."""
    helpers = max(min((os.cpu_count() or 1) - 2, 14), 1)
    wanted = kinds(cases)[:WARM_KINDS]
    started = time.monotonic()
    done = compile_ahead(wanted, seconds, helpers, lambda: helper_for(args.device))
    spent = f"{done} of {len(wanted)} kinds of cases compiled ahead in {time.monotonic() - started:.0f} s"
    print(spent, flush=True)
    return spent


def _chip_line(chip: Answer) -> str:
    if "rate" not in chip:
        return f"the chip could not be measured: {chip}; there will be no roofline"
    speed = f"{chip['bandwidth'] / 1e12:.2f} TB/s copy, {chip['rate'] / 1e12:.0f} TFLOP/s bf16"
    return f"{chip['name']}, driver {chip['driver']}, {chip['memory_gib']} GiB: {speed}"


def _peer_line(p: dict[str, str]) -> str:
    return f"{p['name']}: {p['version']}" if "version" in p else f"{p['name']}: absent ({p['absent']})"
