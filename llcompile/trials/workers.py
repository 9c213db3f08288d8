"""Workers: the runs of a trial, in this process or side by side in several; finished runs go to the store."""

from __future__ import annotations

import pickle
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch

from llcompile.errors import TrialError
from llcompile.trials import batches
from llcompile.trials.arms import Arm
from llcompile.trials.batches import Source
from llcompile.trials.plan import Plan
from llcompile.trials.running import ModelFn, OwnLoss, State, build
from llcompile.trials.store import Store
from llcompile.trials.training import Exam, Record, run

_EVERY = 30.0  # seconds between two lines about the same run


@dataclass(frozen=True)
class Setup:
    """What every run needs; it goes to other processes as it is. `judged` are the bins that the verdict is about."""

    model_fn: ModelFn
    source: Source
    loss: OwnLoss | None
    plan: Plan
    levels: int
    bounds: tuple[int, ...]
    judged: tuple[int, ...]
    folder: Path
    checkpoint: State
    lines: bool


@dataclass(frozen=True)
class Count:
    """Where a trial is: runs in all, those finished before this start, files then, and its time (`time.time()`)."""

    total: int
    finished: int
    files: int
    began: float

    def done(self, store: Store) -> int:
        """How many runs are finished now."""
        return self.finished + store.finished() - self.files

    def left(self, done: int) -> str:
        """How long the rest will take, judging by what this start has finished: ", about 2 min left"."""
        new = done - self.finished
        if new < 1 or done >= self.total:
            return ""
        return f", about {_duration((time.time() - self.began) / new * (self.total - done))} left"


def run_all(setup: Setup, jobs: Sequence[tuple[Arm, Sequence[int]]], count: Count) -> None:
    """Finish all runs.

    Raises:
        TrialError: with several workers, the model's function or another one cannot be sent to a process.
    """
    if setup.plan.workers == 1 or len(jobs) < 2:
        for arm, seeds in jobs:
            run_arm(setup, count, arm, seeds)
        return
    try:
        pickle.dumps(setup)
    except Exception as error:
        raise TrialError(
            f"with workers={setup.plan.workers}, model_fn, batches and loss go to other processes: {error}. "
            "Define them at the top of a module, or use workers=1"
        ) from error
    with ProcessPoolExecutor(min(setup.plan.workers, len(jobs)), get_context("spawn"), _alone) as pool:
        running = [pool.submit(run_arm, setup, count, arm, seeds) for arm, seeds in jobs]
        try:
            for future in running:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _alone() -> None:
    torch.set_num_threads(1)  # threads of several processes would wait for each other


def run_arm(setup: Setup, count: Count, arm: Arm, seeds: Sequence[int]) -> None:
    """Finish the runs of one arm: its model is compiled once."""
    store, plan = Store(setup.folder), setup.plan
    held = [batch.to(plan.place) for batch in batches.held_out(setup.source, plan.held_out)]
    exam = Exam(held, setup.bounds, setup.loss)
    example = next(batches.training(setup.source, seeds[0], 1))
    with room():
        runner = build(arm, setup.model_fn, example, plan, setup.levels)
        for seed in seeds:
            ticker = partial(_Ticker(setup.lines).tick, f"{arm.name}, seed {seed}", plan.steps)
            record = run(runner, setup.checkpoint, setup.source, exam, plan, seed, ticker)
            store.keep(arm, record)
            say(setup.lines, _line(record, setup, count, count.done(store)))


class _Ticker:
    """Says where a long run is, now and then."""

    def __init__(self, lines: bool) -> None:
        self.lines, self.last = lines, time.perf_counter()

    def tick(self, what: str, steps: int, step: int, loss: float) -> None:
        now = time.perf_counter()
        if now - self.last > _EVERY:
            self.last = now
            say(self.lines, f"  {what}: step {step} of {steps}, loss {loss:.4f}")


def room() -> AbstractContextManager[None]:
    """Room in Dynamo's cache for a model of each arm."""
    patched: AbstractContextManager[None] = torch._dynamo.config.patch(
        recompile_limit=256, accumulated_recompile_limit=4096
    )
    return patched


def say(lines: bool, line: str) -> None:
    """A line for whoever waits."""
    if lines:
        print(line, file=sys.stderr, flush=True)


def _line(record: Record, setup: Setup, count: Count, done: int) -> str:
    half, metric = record.judge, setup.plan.metric
    value = None if half is None else half.position.value(metric, setup.judged)
    result = f"diverged at step {record.diverged}" if value is None else f"{metric} {value:.4f}"
    where = f"{done} of {count.total}"
    return f"[{where}] {record.arm}, seed {record.seed}: {result} ({record.seconds:.0f} s{count.left(done)})"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
