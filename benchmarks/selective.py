"""Mamba-1's selective scan and an erase key of its own: times beside transformers' scan, and beside the delta rule.

    python -m benchmarks.selective [--device cuda] [--lengths 512 4096] [--json FILE]

Linear and log-linear, forward and both passes; runs of one length take turns. On a CPU one thread, float32, and the
selective scan of transformers in plain PyTorch besides, whose backward pass is tried at 512 tokens only: its time
grows with T squared. On a GPU bfloat16.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import record
from llcompile.arguments import at_least
from llcompile.ops import loglinear_attention

LEVELS, CHANNELS, STATES = 17, 1536, 16
HEADS, WIDTH = 4, 64
PEER_BACKWARD = 512  # the most tokens
Operands = dict[str, Tensor]


def main(given: list[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument(
        "--lengths", type=at_least(1), nargs="+", default=[512, 4096], help="tokens (default: 512 4096)"
    )
    parser.add_argument("--turns", type=at_least(1), default=3, help="how often each runs (default: 3)")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    args = parser.parse_args(given)
    if args.device == "cpu":
        torch.set_num_threads(1)
    rows = [row for length in args.lengths for row in measured(length, args.device, args.turns)]
    for row in rows:
        print(f"{row['what']:<34}{row['tokens']:>7} tokens {row['passes']:<9}{1e3 * row['seconds']:>10.2f} ms")
    seen = record.environment(args.device)
    print(f"{seen['machine']}, {seen['threads']} threads, {seen['versions']}")
    if args.json is not None:
        record.write(args.json, {"environment": seen, "results": rows})
    return 0


def measured(length: int, device: str, turns: int) -> list[dict[str, Any]]:
    """The median times at one length, in seconds."""
    jobs = calls(length, device)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in jobs}
    for turn in range(1 + turns):  # the first one compiles
        for key, call in jobs.items():
            slow = turn > 1 and times[key][0] > 10
            if not slow:
                seconds = timed(call, device)
                times[key] += [seconds] if turn else []
    return [
        {"what": what, "passes": passes, "tokens": length, "seconds": statistics.median(found)}
        for (what, passes), found in times.items()
    ]


def timed(call: Callable[[], Any], device: str) -> float:
    """Seconds of a call, the device's work included."""
    wait = torch.cuda.synchronize if device != "cpu" else lambda: None
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def calls(length: int, device: str) -> dict[tuple[str, str], Callable[[], Any]]:
    """What is timed, by its name and its passes."""
    torch.manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    found: dict[tuple[str, str], Callable[[], Any]] = {}
    for name, (x, sets) in {"Mamba-1": scan(length, device, dtype), **delta_rules(length, device, dtype)}.items():
        weights = torch.rand(1, length, sets, LEVELS, device=device)
        add(found, f"{name}, linear", x, lambda **x: loglinear_attention(level_weights=None, **x)[0])
        add(found, f"{name}, log-linear", {**x, "level_weights": weights}, lambda **x: loglinear_attention(**x)[0])
        if name == "Mamba-1" and device == "cpu":
            add(found, f"{name}, transformers", x, transformers_scan, backward=length <= PEER_BACKWARD)
    return found


def add(found: dict[Any, Any], name: str, x: Operands, run: Callable[..., Tensor], backward: bool = True) -> None:
    """Both kinds of passes of a function of operands."""
    leaves = {key: value.detach().clone().requires_grad_() for key, value in x.items()}
    found[name, "forward"] = lambda: run(**x)
    if backward:
        found[name, "both"] = lambda: run(**leaves).sum().backward()


def scan(length: int, device: str, dtype: torch.dtype) -> tuple[Operands, int]:
    """A selective scan of Mamba-1's size, and its sets of level weights."""
    q, k = torch.randn(2, 1, length, 1, STATES, device=device, dtype=dtype).unbind()
    v = torch.randn(1, length, CHANNELS, 1, device=device, dtype=dtype)
    step, rate = torch.rand(1, length, CHANNELS, device=device), 8 * torch.rand(CHANNELS, STATES, device=device)
    return {"q": q, "k": k, "v": v, "log_decay": -step, "decay_rate": rate}, CHANNELS // 64


def delta_rules(length: int, device: str, dtype: torch.dtype) -> dict[str, tuple[Operands, int]]:
    """A delta rule, and the same with an erase key of its own; decays per channel."""
    shape = (1, length, HEADS, WIDTH)
    q, k, v, e = (torch.randn(shape, device=device, dtype=dtype) for _ in range(4))
    k, e = (torch.nn.functional.normalize(x.float(), dim=-1).to(dtype) for x in (k, e))
    x = {"q": q, "k": k, "v": v, "log_decay": -0.1 * torch.rand(shape, device=device)}
    beta = torch.rand(shape[:3], device=device)
    return {
        "delta rule": ({**x, "beta": beta}, HEADS),
        "erase key": ({**x, "erase_query": e, "erase_key": 0.5 * e}, HEADS),
    }


def transformers_scan(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, decay_rate: Tensor) -> Tensor:
    """transformers' scan on the operands of `scan`."""
    from transformers.models.mamba import modeling_mamba

    u, step, key, query = (x.squeeze(-1).transpose(1, 2) for x in (v, -log_decay, k[:, :, 0], q[:, :, 0]))
    output: Tensor = modeling_mamba.mamba_selective_scan(u, step, -decay_rate, key, query)
    return output


if __name__ == "__main__":
    raise SystemExit(main())
