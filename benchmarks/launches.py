"""Every kernel of a pass with every launch that the autotuner would try: milliseconds, registers, spills.

    python -m benchmarks.launches [--tokens 32768] [--sizes 128x128] [--families scalar/none scalar/delta]
                                  [--jobs 8] [--json FILE]

On a GPU alone, bfloat16, 32 heads. First `jobs` processes compile what will be timed, on calls of 2,048 tokens; then
this one times launch after launch, each on what the launches before it have left. The first launch of a row is the
default. `kernels/triton/measured.py` has what was fastest.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import process, record
from benchmarks.cuda.cases import OURS, Case
from benchmarks.cuda.operands import make
from llcompile.arguments import at_least
from llcompile.kernels.description import describe
from llcompile.kernels.operands import Operands
from llcompile.kernels.triton import autotune, blocks, engine
from llcompile.kernels.triton.description import Description
from llcompile.kernels.triton.launch import Launch
from llcompile.kernels.triton.meter import meter_of
from llcompile.kernels.triton.tuning import Tuning

SHORT = 2048
HEADS = 32
Row = dict[str, Any]


class Pass(NamedTuple):
    """One pass of one family at one size."""

    family: str
    size: str
    what: str
    run: Callable[[], object]

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.family} {self.size} {self.what}"


def main(given: list[str] | None = None) -> int:
    """Compile, time, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=at_least(SHORT), default=2**15, help="tokens when timed (default: 32768)")
    parser.add_argument("--sizes", nargs="+", default=["128x128"], help="K and V, as 128x64 (default: 128x128)")
    parser.add_argument(
        "--families", nargs="+", default=["scalar/none", "scalar/delta"], help="default: scalar/none scalar/delta"
    )
    parser.add_argument("--jobs", type=at_least(1), default=8, help="processes that compile (default: 8)")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--compile", type=int, metavar="N", help=argparse.SUPPRESS)  # what a job is told
    args = parser.parse_args(given)
    if args.compile is not None:
        compile_share(args, args.compile)
        return 0
    command = [sys.executable, "-m", "benchmarks.launches", *(sys.argv[1:] if given is None else given), "--compile"]
    jobs = [subprocess.Popen([*command, str(i)], env=process.environment()) for i in range(args.jobs)]
    codes = [job.wait() for job in jobs]
    if any(codes):
        print("a process that compiles failed; what it left is compiled while launches are timed")
    rows = [row for one in passes(args, args.tokens) for row in timed(one)]
    seen = record.environment("cuda")
    print(f"{seen['machine']}, {seen['versions']}")
    if args.json is not None:
        record.write(args.json, {"environment": seen, "tokens": args.tokens, "results": rows})
    return 0


def passes(args: argparse.Namespace, tokens: int) -> Iterator[Pass]:
    """The forward pass in blocks where there is one, the one by chunks, and the backward pass."""
    for size in args.sizes:
        key_dim, value_dim = map(int, size.split("x"))
        for family in args.families:
            decay, correction = family.split("/")
            x = operands(Case(OURS, "log-linear", decay, correction, "forward", tokens, 1, HEADS, key_dim, value_dim))
            if blocks.may(Description.of(describe(x, False))):
                yield Pass(family, size, "forward in blocks", partial(blocks.forward, x, 1.0))
            yield Pass(family, size, "forward", partial(by_chunks, x))
            yield Pass(family, size, "backward", partial(engine.backward, x, 1.0, x.v, None))


def operands(case: Case) -> Operands:
    """Random operands of `case`, level weights for as many levels as all benchmarks have."""
    x = make(case, "cuda")
    names = ("q", "k", "v", "level_weights", "log_decay", "decay_rate", "beta")
    return Operands(*(x.get(name) for name in names))  # type: ignore[arg-type]


def by_chunks(x: Operands) -> None:
    """The forward pass with a program for each chunk, however long the call is."""
    with blocks.never():
        engine.forward(x, 1.0, False)


def compile_share(args: argparse.Namespace, share: int) -> None:
    """Compile every `args.jobs`-th launch, from the `share`-th on, and run none."""
    launches: dict[tuple[int, Tuning], Launch] = {}
    for one in passes(args, SHORT):
        with autotune.handed_to(lambda launch: launches.update(_with_each(launch))):
            one.run()
    meter = meter_of(torch.cuda.current_device())
    for (_, chosen), launch in list(launches.items())[share :: args.jobs]:
        meter.refused(launch, chosen)


def _with_each(launch: Launch) -> dict[tuple[int, Tuning], Launch]:
    return {(id(launch.kernel), chosen): launch for chosen in autotune.candidates(launch.kernel)}


def timed(one: Pass) -> list[Row]:
    """A row for each launch of a pass, and one for the whole pass with the defaults."""
    meter, rows = meter_of(torch.cuda.current_device()), []

    def act(launch: Launch) -> None:
        found = [measured(launch, chosen) for chosen in autotune.candidates(launch.kernel)]
        launch(launch.kernel.default)
        rows.append({"kernel": launch.kernel.name, "programs": launch.programs, "launches": found})
        print(f"{one.title}: {launch.kernel.name}, {launch.programs} programs")
        for row in found:
            print("   ", ", ".join(f"{name} {value}" for name, value in row.items()), flush=True)

    with autotune.handed_to(act):
        one.run()

    def whole_pass() -> None:
        one.run()

    whole = meter.milliseconds(whole_pass)
    print(f"{one.title}: {whole:.3f} ms", flush=True)
    about = {"family": one.family, "size": one.size, "pass": one.what}
    return [*({**about, **row} for row in rows), {**about, "milliseconds": round(whole, 4)}]


def measured(launch: Launch, chosen: Tuning) -> Row:
    """Milliseconds of `launch` with `chosen`, and what the compiler says of it; or why it does not run."""
    meter = meter_of(torch.cuda.current_device())
    reason = meter.refused(launch, chosen)
    if reason is not None:
        return {**chosen._asdict(), "left_out": reason}
    with autotune.unchanged(launch):
        milliseconds = meter.milliseconds(partial(launch, chosen))
    compiled = launch.compiled(chosen)
    return {
        **chosen._asdict(),
        "milliseconds": round(milliseconds, 4),
        "registers": compiled.n_regs,
        "spilled": compiled.n_spills,
        "shared": compiled.metadata.shared,
    }


if __name__ == "__main__":
    sys.exit(main())
