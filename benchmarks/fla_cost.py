"""What FLA's kernels move and compute beside ours, both counted in Triton's interpreter, without a GPU.

    python -m benchmarks.fla_cost            # needs flash-linear-attention (FLA) and Triton

Of FLA, distinct bytes are counted once a launch and head: all programs of a launch share a cache, which is kind to it.
Of ours, once a launch, head and value tile (`llcompile kernels cost`). Torch's own operators are left out on both
sides, and what a chip spills to local memory. FLA's autotuners take their first configuration. Counts at `--length`
follow exactly from those at a few chunks; where they follow no formula, there is a dash.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.fla_calls import TWINS, Twin
from llcompile.arguments import at_least
from llcompile.errors import KernelError
from llcompile.kernels.levels import level_count
from llcompile.kernels.triton.cost.case import Case
from llcompile.kernels.triton.cost.count import Cost, costs
from llcompile.kernels.triton.cost.counter import Counted, counting
from llcompile.kernels.triton.cost.scale import Shape, formula

# Chunks of the lengths at which FLA is counted: one more than ours, on the far side of another power of two.
SAMPLES = (2, 3, 4, 5, 6, 9)
_CHUNK = 64
PASSES = ("forward", "backward")
Totals = dict[str, int | None]  # None: counted, but no formula says what it is at other lengths


def fla(twin: Twin, key_dim: int, value_dim: int, length: int) -> dict[str, dict[str, Totals]]:
    """Numbers of FLA's kernels at `length`, by pass and kernel, for one head; counted in this process."""
    samples: dict[str, dict[str, list[tuple[Shape, Counter[str]]]]] = {p: defaultdict(list) for p in PASSES}
    for chunks in SAMPLES:
        for operation, launches in _both(twin, key_dim, value_dim, chunks * _CHUNK, level_count(length)).items():
            for kernel, numbers in _totals(launches).items():
                samples[operation][kernel].append((Shape(chunks, chunks), numbers))
    return {p: {kernel: _at(kernel, found, length) for kernel, found in samples[p].items()} for p in PASSES}


def _both(twin: Twin, key_dim: int, value_dim: int, tokens: int, levels: int) -> dict[str, list[Counted]]:
    leaves = twin.leaves(tokens, 1, key_dim, value_dim, torch.bfloat16, levels)
    run = twin.theirs()
    with counting(lambda *launch: ()) as forward:
        o = run(**leaves)
    with counting(lambda *launch: ()) as backward:
        torch.autograd.grad(o, list(leaves.values()), torch.ones_like(o))
    return {"forward": forward, "backward": backward}


def _totals(launches: list[Counted]) -> dict[str, Counter[str]]:
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for one in launches:
        found[one.kernel] += one.numbers
    return found


def _at(kernel: str, samples: list[tuple[Shape, Counter[str]]], length: int) -> Totals:
    whole = Shape(length // _CHUNK, length // _CHUNK)
    found: Totals = {}
    for name in dict.fromkeys(name for _, numbers in samples for name in numbers):
        try:
            found[name] = formula(f"{kernel}, {name}", [(s, numbers[name]) for s, numbers in samples]).at(whole)
        except KernelError:  # FLA's log-linear kernel has as much arithmetic as the length has levels
            found[name] = None
    return found


def rows(name: str, theirs: dict[str, dict[str, Totals]], ours: list[Cost], chunks: int) -> Iterator[str]:
    """Lines of the table, per chunk of one head."""
    found: dict[tuple[str, str], list[Totals]] = {("FLA", p): list(kernels.values()) for p, kernels in theirs.items()}
    for c in ours:
        kind = "ours, linear" if c.case.levels is None else "ours, log-linear"
        heads = c.case.batch * c.case.heads
        found[kind, c.case.operation] = [{n: x // heads for n, x in row.numbers.items()} for row in c.rows]
    for (who, operation), kernels in found.items():
        products = tuple(dict.fromkeys(n for k in kernels for n in k if n.startswith("dot ")))
        wanted = ((("read", "written"), 1e3), (("loaded", "stored"), 1e3), (products, 1e6), (("pointwise",), 1e6))
        cells = (_cell(kernels, names, chunks * unit) for names, unit in wanted)
        yield f"| {name} | {operation} | {who} | {len(kernels)} | {' | '.join(cells)} |"


def _cell(kernels: list[Totals], names: tuple[str, ...], unit: float) -> str:
    total = 0
    for name, numbers in itertools.product(names, kernels):
        number = numbers.get(name, 0)
        if number is None:
            return "-"
        total += number
    return f"{total / unit:.1f}"


def main() -> None:
    """Print the table; write JSON with `--json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--twin", action="append", choices=tuple(TWINS), help="may be repeated (default: all)")
    parser.add_argument("--length", type=at_least(1), default=65_536, help="tokens, a multiple of 64 (default: 65536)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all numbers to a file")
    parser.add_argument("--worker", nargs=3, metavar=("TWIN", "K", "V"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        name, key_dim, value_dim = args.worker
        from benchmarks.fla_interpreter import prepare

        prepare()
        print(json.dumps(fla(TWINS[name], int(key_dim), int(value_dim), args.length)))
        return
    if importlib.util.find_spec("fla") is None:
        sys.exit("FLA is not installed: pip install flash-linear-attention")
    print("| function | pass | whose | kernels | moved, KB a chunk | asked for, KB | products, MFLOP | other, MFLOP |")
    print("|---|---|---|---|---|---|---|---|")
    record = {name: _twin(name, args.length) for name in args.twin or TWINS}
    if args.json is not None:
        args.json.write_text(json.dumps({"length": args.length, "twins": record}, indent=1) + "\n")


def _twin(name: str, length: int) -> dict[str, Any]:
    twin = TWINS[name]
    key_dim, value_dim = 128, 64 if twin.family == "scalar/none" else 128
    command = [sys.executable, "-m", "benchmarks.fla_cost", "--length", str(length)]
    command += ["--worker", name, str(key_dim), str(value_dim)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    theirs = json.loads(done.stdout.splitlines()[-1])
    forms = (level_count(length),) if twin.weighted else (None, level_count(length))
    ours = costs(
        Case(twin.family, p, key_dim, value_dim, groups=1 if twin.weighted else 32, length=length, levels=levels)  # type: ignore[arg-type]
        for levels in forms
        for p in PASSES
    )
    print("\n".join(rows(name, theirs, ours, length // _CHUNK)), flush=True)
    return {"fla": theirs, "ours": [c.record() for c in ours], "sizes": {"K": key_dim, "V": value_dim}}


if __name__ == "__main__":
    main()
