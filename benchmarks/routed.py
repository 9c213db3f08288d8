"""What routed level weights cost: the operator with level weights, beside the same with per-level readouts before it.

    python -m benchmarks.routed [--device cuda] [--graph] [--mixers small] [--lengths 1024 4096] [--json FILE]

The operator alone comes in turns with readouts and the operator behind them: forward, both passes, and one decoded
token, whose readouts come from its state and go into the next one. The ratio is of each turn's pair, its median and
quartiles over the turns; the budget is 1.3. On a CPU one thread and float32, on a GPU bfloat16. The level weights
themselves (a projection of the token, and one more of the readouts) are left out on both sides.

The small mixers are smaller than those of any published model: what they show is what a second call costs the host.
With `--graph`, each side is the replay of a CUDA graph, where the host has no part.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import record
from benchmarks.cuda.timing import as_graph
from benchmarks.selective import timed
from llcompile.arguments import at_least
from llcompile.errors import BenchError
from llcompile.ops import level_readouts, level_readouts_step, loglinear_attention, loglinear_attention_step

LEVELS = 16
BUDGET = 1.3
Call = Callable[[], Any]


class Mixer(NamedTuple):
    """Heads, K, V and whether there is a delta rule. Each head has level weights of its own."""

    heads: int
    key_dim: int
    value_dim: int
    delta: bool


MIXERS = {
    "small Mamba-2": Mixer(8, 64, 64, delta=False),
    "small gated delta": Mixer(4, 64, 64, delta=True),
    "Mamba-2 130M": Mixer(24, 128, 64, delta=False),
    "Mamba-2 2.7B": Mixer(80, 128, 64, delta=False),
    "Qwen3-Next 80B": Mixer(32, 128, 128, delta=True),
}


def main(given: list[str] | None = None) -> int:
    """Measure, print and write; 1 where a ratio is over the budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--graph", action="store_true", help="time replays of CUDA graphs; needs a CUDA device")
    parser.add_argument("--mixers", nargs="+", default=[""], help="those whose names hold one of these (default: all)")
    parser.add_argument(
        "--lengths", type=at_least(1), nargs="+", default=[1024, 4096], help="tokens (default: 1024 4096)"
    )
    parser.add_argument("--channels", type=at_least(1), default=16, help="R of a routing query and key (default: 16)")
    parser.add_argument("--turns", type=at_least(1), default=9, help="how often each runs (default: 9)")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    args = parser.parse_args(given)
    chosen = {name: mixer for name, mixer in MIXERS.items() if any(part in name for part in args.mixers)}
    if not chosen:
        parser.error(f"--mixers {' '.join(args.mixers)} is part of no name of {', '.join(MIXERS)}")
    if args.graph and args.device == "cpu":
        parser.error("--graph needs a CUDA device: pass --device cuda too")
    if args.device == "cpu":
        torch.set_num_threads(1)
    rows = []
    for name, mixer in chosen.items():
        for length in args.lengths:
            for what, pair in calls(mixer, length, args.channels, args.device).items():
                plain, whole = (graphed(call) for call in pair) if args.graph else pair
                found = {"mixer": name, "tokens": length, "what": what, **ratio(plain, whole, args.device, args.turns)}
                rows.append(found)
                print(line(found), flush=True)
    seen = record.environment(args.device)
    print(f"{seen['machine']}, {seen['threads']} threads, {seen['versions']}")
    if args.json is not None:
        found = {"environment": seen, "channels": args.channels, "graph": args.graph, "results": rows}
        record.write(args.json, found)
    return int(any(row["ratio"] > BUDGET for row in rows))


def graphed(call: Call) -> Call:
    """The replay of a CUDA graph of `call`; raises BenchError where it cannot be captured."""
    replay, reason = as_graph(call)
    if reason is not None:
        raise BenchError(f"no CUDA graph can be captured of this call ({reason}); run without --graph")
    return replay


def ratio(plain: Call, whole: Call, device: str, turns: int) -> dict[str, float]:
    """Seconds of `plain`, and the paired ratio of `whole` to it: the median, and the quartiles."""
    pairs = [(timed(plain, device), timed(whole, device)) for _ in range(2 + turns)][2:]  # the first ones compile
    found = [b / a for a, b in pairs]
    low, middle, high = statistics.quantiles(found, n=4)
    return {"seconds": statistics.median(a for a, _ in pairs), "ratio": middle, "low": low, "high": high}


def line(row: dict[str, Any]) -> str:
    """A result for a person."""
    verdict = "within" if row["ratio"] <= BUDGET else "over"
    return (
        f"{row['mixer']:<18}{row['tokens']:>7} tokens {row['what']:<9}{1e3 * row['seconds']:>9.3f} ms   with readouts "
        f"x{row['ratio']:.3f} ({row['low']:.3f} to {row['high']:.3f}), {verdict} the budget of {BUDGET}"
    )


def calls(mixer: Mixer, length: int, channels: int, device: str) -> dict[str, tuple[Call, Call]]:
    """The operator alone, and after readouts: forward, both passes, and a token."""
    torch.manual_seed(0)
    heads, key_dim, value_dim, delta = mixer
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    make: dict[str, Any] = {"device": device, "dtype": dtype}
    q, k = (torch.nn.functional.normalize(torch.randn(1, length, heads, key_dim, **make), dim=-1) for _ in range(2))
    x: dict[str, Any] = {"q": q, "k": k, "v": torch.randn(1, length, heads, value_dim, **make)}
    x["log_decay"] = -0.1 * torch.rand(1, length, heads, device=device)
    x["level_weights"] = torch.rand(1, length, heads, LEVELS, device=device)
    if delta:
        x["beta"] = torch.rand(1, length, heads, device=device)
    routing: dict[str, Any] = {name: torch.randn(1, length, heads, channels, **make) for name in ("query", "key")}
    operator, readouts = partial(loglinear_attention, **x), partial(level_readouts, **routing, levels=LEVELS)
    both = gradients(lambda **x: loglinear_attention(**x)[0], x)
    readouts_both = gradients(lambda **x: level_readouts(**x, levels=LEVELS)[0], routing)
    return {
        "forward": (operator, lambda: (readouts(), operator())),
        "both": (both, lambda: (readouts_both(), both())),
        "token": tokens(x, routing),
    }


def gradients(run: Callable[..., Tensor], x: dict[str, Any]) -> Call:
    """Both passes of a function of operands."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in x.items()}
    grad = torch.randn_like(run(**x))
    return lambda: torch.autograd.grad(run(**leaves), list(leaves.values()), grad)


def tokens(x: dict[str, Any], routing: dict[str, Any]) -> tuple[Call, Call]:
    """A decoded token, alone and with readouts of the state that comes in, kept in the one that goes out."""
    token = {name: t[:, -1] for name, t in x.items()}
    one = {name: t[:, -1] for name, t in routing.items()}
    _, state = loglinear_attention(**x, return_final_state=True)
    assert state is not None
    token["state"] = state

    def routed() -> Any:
        read, new = level_readouts_step(**one, state=state, levels=LEVELS)
        return read, loglinear_attention_step(**token, routing_state=new)

    return torch.no_grad()(lambda: loglinear_attention_step(**token)), torch.no_grad()(routed)


if __name__ == "__main__":
    raise SystemExit(main())
