"""python -m tests.spellings [-k NAME] [--positive | --negative]: what `llcompile.inspect` says of each entry."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from dataclasses import dataclass

import torch

import llcompile
from tests.spellings import EITHER, NEGATIVE, POSITIVE, NearMiss, Spelling


@dataclass(frozen=True)
class Line:
    """The verdict on one entry, and what was found or said.

    "ok", "missed", "WRONG" or "failed"; for one in disguise "found" or "left", both of which are right.
    """

    verdict: str
    found: str


def judge(entry: Spelling | NearMiss) -> Line:
    """Looks at one entry through the public face."""
    torch._dynamo.reset()
    try:
        report = llcompile.inspect(entry.make(), *entry.example())
    except Exception as error:
        return Line("failed", f"{type(error).__name__}: {error}".splitlines()[0][:200])
    found = [f"{c.decay}/{c.correction} ({c.origin}, {c.certificate.max_error:.0e})" for c in report.converted]
    said = [f"declined: {d.reason}" for d in report.declined] + [f"untouched: {u.kind}" for u in report.untouched]
    everything = "; ".join(found + said)
    if entry.name in EITHER:
        return Line("found" if found else "left", everything)
    if isinstance(entry, NearMiss):
        return Line("WRONG" if found else "ok", everything)
    cells = [(c.decay, c.correction) for c in report.converted if c.origin == "graph"]
    if len(report.converted) == 1 and cells and cells[0] in entry.cells:
        return Line("ok", everything)
    return Line("WRONG" if found else "missed", everything or "nothing said")


def main() -> None:
    """Prints one line an entry, then totals."""
    parser = argparse.ArgumentParser(prog="python -m tests.spellings", description=__doc__)
    parser.add_argument("-k", default="", help="only entries whose name has this in it")
    parser.add_argument("--positive", action="store_true", help="only spellings")
    parser.add_argument("--negative", action="store_true", help="only near misses")
    parser.add_argument("-q", action="store_true", help="print only those that are not ok")
    parser.add_argument("--list", action="store_true", help="names and what they are, without a look")
    args = parser.parse_args()
    totals: Counter[tuple[str, str]] = Counter()
    for kind, table, wanted in (
        ("positive", POSITIVE, not args.negative),
        ("negative", NEGATIVE, not args.positive),
        ("either", EITHER, not args.positive and not args.negative),
    ):
        for name, entry in table.items():
            if not wanted or args.k.lower() not in name.lower():
                continue
            label = f"{entry.decay}/{entry.correction}" if isinstance(entry, Spelling) else entry.property
            if args.list:
                print(f"{kind}  {name}  [{label}]")
                continue
            start = time.perf_counter()
            line = judge(entry)
            totals[kind, line.verdict] += 1
            seconds = time.perf_counter() - start
            if line.verdict in ("ok", "left", "found") and args.q:
                continue
            print(f"{line.verdict:7}{seconds:6.1f}s  {name}  [{label}]  {line.found}", flush=True)
    for (kind, verdict), count in sorted(totals.items()):
        print(f"{kind}: {count} {verdict}")


main()
