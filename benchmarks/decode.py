"""Measure the memory and time of one decoded token after a context of 1k to 1M tokens.

Only states are measured: a level state is filled with random numbers and the position of its context, so no long
sequence is run. For comparison, the table has the linear model's state, which never grows, and the key-value cache of
softmax attention.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llcompile.arguments import at_least, check_device

CONTEXTS = [1 << n for n in range(10, 21)]
QUICK = [1 << 10, 1 << 12]
FORMS = ("linear", "log-linear", "softmax")


@dataclass(frozen=True)
class Sizes:
    """One layer's heads and widths, for all three forms."""

    batch: int = 1
    heads: int = 4
    key_dim: int = 64
    value_dim: int = 64


def add_parser(subparsers: Any) -> None:
    """Add ``decode`` to ``llcompile bench``."""
    parser = subparsers.add_parser(
        "decode", help="measure memory and time of one decoded token against context length", description=__doc__
    )
    parser.add_argument("--device", default="cpu", help="device to run on (default: cpu)")
    parser.add_argument("--contexts", type=at_least(1), nargs="+", default=CONTEXTS, help="default: 1k to 1M")
    parser.add_argument("--quick", action="store_true", help="run two short contexts as a smoke test")
    for name, size in asdict(Sizes()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=at_least(1), default=size)
    parser.add_argument("--repeats", type=at_least(1), default=30, help="number of timed tokens; the fastest counts")
    parser.add_argument(
        "--output", type=Path, help="JSON file (default: benchmarks/results/decode-<device>-<date>.json)"
    )
    parser.set_defaults(measure=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write JSON and the plot."""
    from rich.console import Console
    from rich.progress import track

    from benchmarks.record import environment, results_file, write

    console = Console()
    check_device(args.device)
    sizes = Sizes(args.batch, args.heads, args.key_dim, args.value_dim)
    contexts = QUICK if args.quick else sorted(args.contexts)
    jobs = [(form, context) for context in contexts for form in FORMS]
    path = args.output or results_file(f"decode-{args.device}{'-quick' if args.quick else ''}")
    results = []
    for form, context in track(jobs, description="measuring", console=console):
        results.append(measure(form, context, sizes, args.device, 3 if args.quick else args.repeats))
    record = {**environment(args.device), "quick": args.quick, "sizes": asdict(sizes), "results": results}
    record["growth"] = growth(results)
    write(path, record)
    console.print(table(record))
    console.print(f"written to {path}" + plot(record, path.with_suffix(".png")))
    return 0


def measure(form: str, context: int, sizes: Sizes, device: str, repeats: int) -> dict[str, Any]:
    """Bytes of what is kept for one sequence, and seconds for one more token of the whole batch."""
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        step, kept = _PREPARE[form](context, sizes, device)
        seconds = _fastest(step, device, repeats)
    held = sum(tensor.numel() * tensor.element_size() for tensor in kept)
    return {"form": form, "context": context, "bytes": held // sizes.batch, "seconds": seconds}


def growth(results: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By form: bytes per sequence and seconds per token that each doubling of the context adds, by least squares."""
    found = {}
    for form in FORMS:
        points = [r for r in results if r["form"] == form]
        xs = [math.log2(r["context"]) for r in points]
        mean = sum(xs) / len(xs)
        spread = sum((x - mean) ** 2 for x in xs) or 1.0
        slopes = {name: sum((x - mean) * r[name] for x, r in zip(xs, points, strict=True)) / spread for name in FIELDS}
        found[form] = {f"{name}_per_doubling": slope for name, slope in slopes.items()}
    return found


FIELDS = ("bytes", "seconds")
_Prepared = tuple[Callable[[], Any], list[Any]]


def _linear(context: int, sizes: Sizes, device: str) -> _Prepared:
    import torch

    state = torch.randn(sizes.batch, sizes.heads, sizes.key_dim, sizes.value_dim, device=device)
    return _step(sizes, device, state, None), [state]


def _log_linear(context: int, sizes: Sizes, device: str) -> _Prepared:
    import torch

    from llcompile.kernels.levels import level_count
    from llcompile.kernels.state import pack_state

    levels = level_count(context + 1)
    states = torch.randn(sizes.batch, sizes.heads, levels, sizes.key_dim, sizes.value_dim, device=device)
    state = pack_state(states, torch.full((sizes.batch,), context, device=device))
    return _step(sizes, device, state, torch.rand(sizes.batch, sizes.heads, levels, device=device)), [state]


def _step(sizes: Sizes, device: str, state: Any, weights: Any) -> Callable[[], Any]:
    import torch

    from llcompile.ops import loglinear_attention_step

    q, k = torch.randn(2, sizes.batch, sizes.heads, sizes.key_dim, device=device).unbind()
    v = torch.randn(sizes.batch, sizes.heads, sizes.value_dim, device=device)
    log_decay = -0.1 * torch.rand(sizes.batch, sizes.heads, device=device)
    return lambda: loglinear_attention_step(q, k, v, weights, state, log_decay=log_decay)


def _softmax(context: int, sizes: Sizes, device: str) -> _Prepared:
    import torch
    import torch.nn.functional as F

    q = torch.randn(sizes.batch, sizes.heads, 1, sizes.key_dim, device=device)
    k = torch.randn(sizes.batch, sizes.heads, context, sizes.key_dim, device=device)
    v = torch.randn(sizes.batch, sizes.heads, context, sizes.value_dim, device=device)
    return lambda: F.scaled_dot_product_attention(q, k, v), [k, v]


_PREPARE: dict[str, Callable[[int, Sizes, str], _Prepared]] = {
    "linear": _linear,
    "log-linear": _log_linear,
    "softmax": _softmax,
}


def _fastest(step: Callable[[], Any], device: str, repeats: int) -> float:
    import torch

    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    best = math.inf
    for _ in range(repeats + 1):  # the first warms up
        wait()
        start = time.perf_counter()
        step()
        wait()
        best = min(best, time.perf_counter() - start)
    return best


def table(record: dict[str, Any]) -> Any:
    """A row for each context."""
    from rich.table import Table

    sizes = record["sizes"]
    title = "one layer, {heads} heads, K = {key_dim}, V = {value_dim}, float32: KiB per sequence, us per token"
    shown = Table(title=title.format(**sizes), caption=f"{record['machine']}, {record['date'][:16]}")
    shown.add_column("context", justify="right", no_wrap=True)
    for form in FORMS:
        shown.add_column(f"{form}, KiB", justify="right")
        shown.add_column("us", justify="right")
    found = {(r["form"], r["context"]): r for r in record["results"]}
    for context in sorted({context for _, context in found}):
        cells = [found[form, context] for form in FORMS]
        texts = [text for r in cells for text in (f"{r['bytes'] / 1024:,.0f}", f"{1e6 * r['seconds']:,.0f}")]
        shown.add_row(f"{context:,}", *texts)
    slopes = [record["growth"][form] for form in FORMS]
    texts = [
        t for s in slopes for t in (f"{s['bytes_per_doubling'] / 1024:,.0f}", f"{1e6 * s['seconds_per_doubling']:,.1f}")
    ]
    shown.add_section()
    shown.add_row("per doubling", *texts)
    return shown


def plot(record: dict[str, Any], path: Path) -> str:
    """Draws both fields over the context; returns what to say about it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "; no plot, which needs matplotlib: pip install 'llcompile[plot]'"
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, name, label, scale in zip(
        axes, FIELDS, ("KiB per sequence", "us per token"), (1 / 1024, 1e6), strict=True
    ):
        for form in FORMS:
            points = [r for r in record["results"] if r["form"] == form]
            axis.plot([r["context"] for r in points], [r[name] * scale for r in points], marker="o", label=form)
        axis.set(xscale="log", yscale="log", xlabel="context (tokens)", ylabel=label)
        axis.set_xscale("log", base=2)
        axis.legend()
    figure.savefig(path, dpi=120)
    return f" and {path}"
