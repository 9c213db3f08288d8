"""The two acts of the demo, told on a console."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console

import llcompile
from demo import show
from demo.acting import Acting, change, check_acts
from demo.experiment import Bench, Outcome
from demo.models import TOUR, tour_model
from demo.progress import Bars
from demo.recall import Task
from demo.training import Plan
from llcompile.report import Report


def tour(console: Console) -> None:
    """Converts models of transformers; prints their reports, how far their logits moved, and that they act.

    Raises:
        DemoError: one of them does not.
    """
    console.rule("1. Unmodified transformers models with random weights")
    for model_type, sizes in TOUR:
        with Bars(console) as bars:
            done = bars.stage(f"converting {model_type}")
            report, moved, acting, seconds = convert_and_compare(model_type, sizes)
            done()
        print(report)
        console.print(
            f"convert took {seconds:.1f} s; the logits moved by max |difference| / max |logit| = {moved:.1e}, "
            f"since every level weight is 1.\n{acting}\n",
            soft_wrap=True,
        )


def convert_and_compare(model_type: str, sizes: dict[str, Any]) -> tuple[Report, float, Acting, float]:
    """Converts one model.

    Returns:
        The report, how far the logits moved, how the level weights act, and the seconds that convert took.

    Raises:
        DemoError: the converted model does not act.
    """
    model = tour_model(model_type, sizes)
    tokens = torch.randint(sizes["vocab_size"], (2, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(tokens, use_cache=False).logits
    began = time.perf_counter()
    report = llcompile.convert(model, tokens, use_cache=False)
    seconds = time.perf_counter() - began
    # The rewritten graph runs as it is: for a few passes, Inductor would compile most of a minute.
    compiled = torch.compile(model, backend="loglinear", options={"inner": "eager"})

    def run() -> torch.Tensor:
        logits: torch.Tensor = compiled(tokens, use_cache=False).logits
        return logits

    moved = change(before, run().detach())
    return report, moved, check_acts(model, run, type(model).__name__), seconds


def recall(console: Console, args: argparse.Namespace) -> list[Outcome]:
    """Trains, converts and goes on, for each seed; prints and plots what came of it."""
    task = Task(distances=args.distances)
    plan = replace(Plan(), **{name: value for name in ("steps", "more") if (value := getattr(args, name)) is not None})
    console.rule("2. Associative recall: a transformers Mamba-2, before and after conversion")
    with Bars(console) as bars:
        done = bars.stage("converting the model for part 2")
        bench = Bench(task, plan)
        done()
    print(bench.report)
    console.print("\n" + _introduction(bench), soft_wrap=True)
    with _one_thread(), Bars(console) as bars:
        outcomes = []
        for seed in range(args.seed, args.seed + args.seeds):
            bars.prefix = f"seed {seed}: " if args.seeds > 1 else ""
            outcomes.append(bench.run(seed, bars))
    moved = max(outcome.moved for outcome in outcomes)
    console.print(f"At conversion the logits changed by max |difference| / max |logit| = {moved:.1e}", soft_wrap=True)
    console.print(f"{outcomes[0].acting}\n", soft_wrap=True)
    console.print(show.accuracies(outcomes, plan))
    console.print(show.by_distance(outcomes, plan, task))
    for line in (*show.verdict(outcomes), "\nwhat the level weights do in the trained models:", *show.effect(outcomes)):
        console.print(line, soft_wrap=True)
    written = [show.plot(outcomes, task, plan, args.out), show.save(outcomes, task, plan, args.out)]
    console.print("written: " + ", ".join(str(path) for path in written if path), soft_wrap=True)
    if written[0] is None:
        console.print("No plot was written; plots need matplotlib: pip install 'llcompile[plot]'", soft_wrap=True)
    return outcomes


@contextmanager
def _one_thread() -> Iterator[None]:
    """These tensors are small, and threads that wait for each other lose much when another program wants a core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _introduction(bench: Bench) -> str:
    task, plan, mixer = bench.task, bench.plan, bench.report.converted[0]
    told = {
        "key": "The distance to a value depends on its key: some are queried soon, others late. (With --distances "
        "any it does not, and level weights help little; see docs/recall-experiments.md.)",
        "any": "The distance to a value does not depend on its key.",
    }[task.distances]
    return (
        f"Up to {task.pairs} key-value pairs in {task.length} tokens; each key is queried once, "
        f"1 to {2**task.octaves - 1} slots of two tokens later. {told} The model has one layer, its "
        f"linear state {mixer.heads} x {mixer.key_dim} x {mixer.value_dim} numbers: too small for so many pairs.\n"
        f"{plan.steps} steps as a linear model, then {plan.more} more in three ways, "
        "each from the same checkpoint and on the same batches.\n"
    )
