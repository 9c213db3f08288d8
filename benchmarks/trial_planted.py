"""Two planted tasks that a trial must tell apart: one where conversion pays, and one where it cannot.

    python -m benchmarks.trial_planted [--runs 5] [--workers 2] [--json FILE]

`told`: associative recall of more pairs than the linear state holds, where the key tells how far back its value lies.
`solved`: the same sequences for a model whose state holds all pairs, so that there is nothing to gain. Each run draws
its own model, trains it as a linear one, and then makes a trial of it with its own seeds. A trial must say "convert" of
the first and "do not convert" of the second. Trials are processes of one thread, so many of them fill a large machine;
with a GPU, they share it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parent.parent / "examples"))

from benchmarks import record
from demo.recall import Task
from llcompile.arguments import at_least
from llcompile.trials.arms import STAY, Arm
from llcompile.trials.batches import TRAIN, Batch
from llcompile.trials.plan import Plan
from llcompile.trials.result import Trial
from llcompile.trials.running import build
from llcompile.trials.training import train
from llcompile.trials.trial import trial

LENGTH, BATCH, HELD_OUT = 64, 16, 16
PAIRS = 15
TASKS = {"told": (4, "convert"), "solved": (32, "do not convert")}  # width of a key, and what a trial must say
BEFORE, STEPS, SEEDS = 2000, 200, 5
HELD_OUT_SEED = 2**31  # no training has it; of a larger one, a generator on the CPU takes 32 bits
RATE_BEFORE, RATE = 1e-2, 5e-3


class Mixer(nn.Module):
    """Linear attention with a scalar decay, one head, written as a masked product."""

    def __init__(self, width: int, key: int) -> None:
        super().__init__()
        self.mix = nn.Conv1d(width, width, 4, padding=3, groups=width)
        self.query, self.key = nn.Linear(width, key), nn.Linear(width, key)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.forget = nn.Linear(width, 1)
        nn.init.constant_(self.forget.bias, 4.0)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        length = x.shape[1]
        x = F.silu(self.mix(x.transpose(1, 2))[..., :length].transpose(1, 2))
        q, k = F.normalize(self.query(x), dim=-1), F.normalize(self.key(x), dim=-1)
        decay = F.logsigmoid(self.forget(x)).squeeze(-1).cumsum(1)
        between = decay.unsqueeze(2) - decay.unsqueeze(1)
        later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        scores = q @ k.transpose(1, 2) * between.masked_fill(later, float("-inf")).exp()
        return self.out(scores @ self.value(x))


class Model(nn.Module):
    """A language model of one layer."""

    def __init__(self, vocabulary: int, key: int, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.norm, self.mixer = nn.LayerNorm(width), Mixer(width, key)
        self.final, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, T, vocabulary]."""
        x = self.embed(tokens)
        return self.head(self.final(x + self.mixer(self.norm(x))))


TASK = Task(length=LENGTH, pairs=PAIRS)  # of the demo, in a smaller size


def batches(split: str, seed: int) -> Iterator[Batch]:
    """Batches of fresh sequences, without an end; those held out are the same for all runs."""
    generator = torch.Generator().manual_seed(seed if split == TRAIN else HELD_OUT_SEED)
    while True:
        drawn = TASK.draw(BATCH, generator)
        yield Batch(drawn.tokens, drawn.answers, 2 ** drawn.octaves.clamp(min=0))


def main(given: list[str] | None = None) -> int:
    """Run all trials; 0 if each says what it must."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=at_least(1), default=5, help="trials of each task (default: 5)")
    parser.add_argument("--workers", type=at_least(1), default=2, help="trials at the same time (default: 2)")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="default: all")
    parser.add_argument(
        "--before", type=at_least(1), default=BEFORE, help=f"steps of the linear model (default: {BEFORE})"
    )
    parser.add_argument(
        "--steps", type=at_least(1), default=STEPS, help=f"steps of each run of a trial (default: {STEPS})"
    )
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    args = parser.parse_args(given)
    began = time.perf_counter()
    jobs = [(task, run) for run in range(args.runs) for task in args.tasks]
    found = []
    for row in _results(jobs, args.workers, args.before, args.steps, args.device):
        found.append(row)
        print(_line(row, len(found), len(jobs), time.perf_counter() - began), flush=True)
    right = {task: sum(row["right"] for row in found if row["task"] == task) for task in args.tasks}
    print("; ".join(f"{task}: {number} of {args.runs} right" for task, number in right.items()))
    if args.json is not None:
        settings = {"before": args.before, "steps": args.steps, "seeds": SEEDS, "workers": args.workers}
        seen = record.environment(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        record.write(args.json, {"environment": seen, "settings": settings, "results": sorted(found, key=_order)})
    return int(any(not row["right"] for row in found))


def _results(
    jobs: list[tuple[str, int]], workers: int, before: int, steps: int, device: str | None
) -> Iterator[dict[str, Any]]:
    if workers == 1:
        yield from (one(*job, before, steps, device) for job in jobs)
        return
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        for future in as_completed([pool.submit(one, *job, before, steps, device) for job in jobs]):
            yield future.result()


def one(task: str, run: int, before: int, steps: int, device: str | None) -> dict[str, Any]:
    """Train a linear model, make a trial of it, and say what came of it."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    key, expected = TASKS[task]
    checkpoint = linear(key, run, before, device)
    settings: dict[str, Any] = {"steps": steps, "rates": (RATE,), "inner": "eager", "device": device}
    result = trial(
        partial(restored, key, checkpoint),
        batches,
        seeds=tuple(range(SEEDS * run, SEEDS * (run + 1))),
        held_out=HELD_OUT,
        progress=False,
        **settings,
    )
    return {
        "task": task,
        "run": run,
        "expected": expected,
        "decision": result.verdict.decision,
        "right": result.verdict.decision == expected,
        "why": result.verdict.why,
        "arms": _arms(result),
        "seconds": time.perf_counter() - began,
    }


def linear(key: int, run: int, steps: int, device: str | None) -> dict[str, Tensor]:
    """The state of a linear model of its own start, trained from there."""
    torch.manual_seed(run)
    model = Model(TASK.vocabulary, key)
    plan = Plan(steps=steps, rates=(RATE_BEFORE,), inner="eager", device=device)
    example = next(batches(TRAIN, 0))
    runner = build(Arm(STAY, "", RATE_BEFORE), lambda: model, example, plan, 1)
    seed = 10_000 + run  # no trial has it
    diverged = train(runner, batches, None, plan, seed)
    if diverged is not None:
        raise RuntimeError(f"the linear model diverged at step {diverged}")
    return {name: x.detach().cpu().clone() for name, x in model.state_dict().items()}


def restored(key: int, state: dict[str, Tensor]) -> nn.Module:
    """The trained linear model."""
    model = Model(TASK.vocabulary, key)
    model.load_state_dict(state)
    return model


def _arms(result: Trial) -> dict[str, dict[str, Any]]:
    return {
        row.arm: {"loss": row.loss, "accuracy": row.accuracy, "gain": None if row.gain is None else str(row.gain)}
        for row in result.rows
    }


def _line(row: dict[str, Any], done: int, total: int, seconds: float) -> str:
    mark = "right" if row["right"] else f"WRONG, expected {row['expected']}"
    left = seconds / done * (total - done)
    said = f"[{done} of {total}] {row['task']}, run {row['run']}: {row['decision']} ({mark}; {row['seconds']:.0f} s"
    return f"{said}, about {left:.0f} s left)\n    {row['why']}"


def _order(row: dict[str, Any]) -> tuple[str, int]:
    return row["task"], row["run"]


if __name__ == "__main__":
    sys.exit(main())
