"""What the first compiled training step costs, beside plain Inductor's: a small mamba2 of transformers, in CPU time.

    python -m benchmarks.first_step [--layers 2] [--length 64] [--turns 1] [--json FILE] [--profile FILE]

Each measurement is a process with empty caches (Inductor's and ours), one backend after the other in each turn.
CPU time of the process and of its children (the C++ compiler) counts: other programs change it less. The budget is 1.3
times plain Inductor's. A turn takes some minutes on one core. The file is written after each turn.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import record
from llcompile.arguments import at_least

BACKENDS = ("inductor", "loglinear")
BUDGET = 1.3
SIZES = {"vocab_size": 64, "hidden_size": 64, "num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1}
_CACHES = ("TORCHINDUCTOR_CACHE_DIR", "LLCOMPILE_KERNEL_DIR")


def main() -> None:
    """Print a line for each measurement, and the median ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=at_least(1), default=2)
    parser.add_argument("--length", type=at_least(1), default=64)
    parser.add_argument("--turns", type=at_least(1), default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: benchmarks/results/first-step-cpu-<date>")
    parser.add_argument("--profile", metavar="FILE", help="write a cProfile of the step with our backend")
    parser.add_argument("--one", choices=BACKENDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args.layers, args.length, args.profile)))
        return
    path = args.json or record.results_file("first-step-cpu")
    turns: list[dict[str, Any]] = []
    for _ in range(args.turns):
        turns.append({backend: _in_process(backend, args) for backend in BACKENDS})
        for backend, seconds in turns[-1].items():
            print(f"{backend:>9}: {', '.join(f'{name} {value:.1f}' for name, value in seconds.items())}", flush=True)
        record.write(path, _summary(turns, args))
    ratio = _summary(turns, args)["ratio"]
    print(f"first step, loglinear / inductor: {ratio:.2f} (budget {BUDGET}, {len(turns)} turns); wrote {path}")


def _summary(turns: list[dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    ratios = [_step(turn["loglinear"]) / _step(turn["inductor"]) for turn in turns]
    return {
        "environment": record.environment("cpu"),
        "model": {"type": "mamba2", "layers": args.layers, "length": args.length, **SIZES},
        "unit": "seconds of CPU time; load is that of the last minute, after the step",
        "turns": turns,
        "ratio": statistics.median(ratios),
        "budget": BUDGET,
    }


def measure(backend: str, layers: int, length: int, profile: str | None) -> dict[str, float]:
    """Seconds of CPU time: `convert` (ours alone, not verified), and the first step's own and its children's."""
    import torch
    from transformers import Mamba2Config, Mamba2ForCausalLM

    torch.manual_seed(0)
    model = Mamba2ForCausalLM(Mamba2Config(num_hidden_layers=layers, **SIZES))
    tokens = torch.randint(SIZES["vocab_size"], (2, length))
    found = {}
    if backend == "loglinear":
        import llcompile

        before = _cpu()
        llcompile.convert(model, tokens, verify=False)
        found["convert"] = sum(_cpu()) - sum(before)
    model.compile(backend=backend)
    profiler = cProfile.Profile() if profile and backend == "loglinear" else None
    before = _cpu()
    with profiler or contextlib.nullcontext():
        model(tokens, labels=tokens).loss.backward()
    own, children = (after - at for after, at in zip(_cpu(), before, strict=True))
    if profiler is not None:
        profiler.dump_stats(str(profile))
    return {**found, "step": own, "its children": children, "load": os.getloadavg()[0]}


def _cpu() -> tuple[float, float]:
    """Seconds of CPU time of this process and of its children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    own, children = (u.ru_utime + u.ru_stime for u in used)
    return own, children


def _step(seconds: dict[str, float]) -> float:
    return seconds["step"] + seconds["its children"]


def _in_process(backend: str, args: argparse.Namespace) -> dict[str, float]:
    call = [sys.executable, "-W", "ignore", "-m", "benchmarks.first_step", "--one", backend]
    call += ["--layers", str(args.layers), "--length", str(args.length)]
    call += ["--profile", args.profile] if args.profile else []
    with tempfile.TemporaryDirectory(prefix="llcompile-first-step-") as folder:
        caches = {name: os.path.join(folder, name) for name in _CACHES}
        # In this process, so that the CPU time of compilations is that of its children.
        environment = {**os.environ, **caches, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        done = subprocess.run(call, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
