"""Training: one run of one arm, from the checkpoint to its record."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llcompile.errors import LLCompileError, TrialError
from llcompile.trials import batches
from llcompile.trials.batches import IGNORED, Batch, Source, said
from llcompile.trials.measures import CHOOSE, JUDGE, Half, measure, measure_own
from llcompile.trials.plan import Plan
from llcompile.trials.running import OwnLoss, Runner, State


@dataclass(frozen=True)
class Exam:
    """The held-out sequences: both halves of them, and the bounds of the bins of positions."""

    batches: list[Batch]
    bounds: tuple[int, ...]
    loss: OwnLoss | None = None

    def measure(self, runner: Runner) -> list[Half]:
        """Both halves for a runner, in eval mode."""
        runner.model.eval()
        try:
            if self.loss is not None:
                loss = self.loss
                return measure_own(self._told(runner, lambda batch: loss(runner.run, batch)), self.batches)
            return measure(self._told(runner, runner.logits), self.batches, self.bounds)
        finally:
            runner.model.train()

    def _told(self, runner: Runner, function: Callable[[Batch], Tensor]) -> Callable[[Batch], Tensor]:
        def run(batch: Batch) -> Tensor:
            with told(f"{runner.arm.name!r} on held-out sequences", batch):
                return function(batch)

        return run


@dataclass(frozen=True)
class Record:
    """What one run gave.

    Args:
        arm: its name.
        seed: of the batches and of new level weights.
        diverged: the step whose loss or result was not a number; None if all were.
        choose, judge: both halves of the held-out sequences after training; None where the run diverged.
        before: the half that judges, at the checkpoint, as this arm runs it; None if its loss is not a number.
        reset: as `judge`, with each level weight put back to 1; None for a control.
        trained: how many parameters were trained.
        step_ms: median time of a step after the first three, which compile, in milliseconds; None without steps.
        seconds: of the whole run.
    """

    arm: str
    seed: int
    diverged: int | None
    choose: Half | None
    judge: Half | None
    before: Half | None
    reset: Half | None
    trained: int
    step_ms: float | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def of(cls, given: dict[str, Any]) -> Record:
        """From what `to_dict` gave."""
        halves = ("choose", "judge", "before", "reset")
        values: dict[str, Any] = {k: Half.of(v) if k in halves and v else v for k, v in given.items()}
        return cls(**values)


Tick = Callable[[int, float], None]


def run(
    runner: Runner,
    checkpoint: State,
    source: Source,
    exam: Exam,
    plan: Plan,
    seed: int,
    tick: Tick = lambda step, loss: None,
) -> Record:
    """Train for `plan.steps` steps from the checkpoint, and measure; `tick` is told each step and its loss.

    Raises:
        TrialError: the data end early, differ in shape, or the level weights turn out to have no effect.
    """
    began = time.perf_counter()
    runner.start(checkpoint, seed)
    before = _finite(exam.measure(runner)[JUDGE])
    trained = sum(p.numel() for group in runner.groups(plan) for p in group["params"])
    times: list[float] = []
    began_step = time.perf_counter()

    def clock(step: int, loss: float) -> None:
        nonlocal began_step
        now = time.perf_counter()
        times.append(now - began_step)
        began_step = now
        tick(step, loss)

    diverged = train(runner, source, exam.loss, plan, seed, clock)
    choose = judge = reset = None
    if diverged is None:
        halves = exam.measure(runner)
        choose, judge = _finite(halves[CHOOSE]), _finite(halves[JUDGE])
        if choose is None or judge is None:
            diverged, choose, judge = plan.steps, None, None
    if judge is not None and runner.levels:
        with runner.without_levels():
            reset = _finite(exam.measure(runner)[JUDGE])
        _check_acts(runner, judge, reset)
    ms = 1e3 * median(times[min(3, len(times) - 1) :]) if times else None
    return Record(
        runner.arm.name, seed, diverged, choose, judge, before, reset, trained, ms, time.perf_counter() - began
    )


def train(
    runner: Runner,
    source: Source,
    own: OwnLoss | None,
    plan: Plan,
    seed: int,
    tick: Tick = lambda step, loss: None,
) -> int | None:
    """Train for `plan.steps` steps; the step at which the loss was not a number, or None.

    Raises:
        TrialError: the data end early, or differ in shape.
    """
    torch.manual_seed(seed)  # for dropout
    groups = runner.groups(plan)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, plan))
    parameters = [p for group in groups for p in group["params"]]
    for step, given in enumerate(batches.training(source, seed, plan.steps), 1):
        batch = given.to(plan.place)
        with told(f"step {step} of {runner.arm.name!r} with seed {seed}", batch):
            loss = (
                own(runner.run, batch)
                if own is not None
                else cross_entropy(runner.training_logits(batch), batch.labels)
            )
            # All of them: what is not trained stays in the graph, so that arms share it, and must not pile up.
            runner.model.zero_grad(set_to_none=True)
            loss.backward()
        nn.utils.clip_grad_norm_(parameters, plan.clip)
        value = loss.item()  # which also waits for a GPU
        if not math.isfinite(value):
            return step
        optimizer.step()
        schedule.step()
        tick(step, value)
    return None


@contextmanager
def told(where: str, batch: Batch, cure: str = "") -> Iterator[None]:
    """What a user's model raises inside becomes a TrialError that names the place and the batch, and ends in `cure`."""
    try:
        yield
    except LLCompileError:
        raise
    except Exception as error:  # whatever the user's model raises
        raise TrialError(
            f"{where}, on tokens {list(batch.tokens.shape)} from {int(batch.tokens.min())} to "
            f"{int(batch.tokens.max())}: {said(error)}{'; ' if cure else ''}{cure}"
        ) from error


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean loss over the labels [B, T] that are not -100, in nats."""
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED)


def rate(step: int, plan: Plan) -> float:
    """The learning rate at a step, as a share of its peak: warm-up, then half a cosine down to 0."""
    rise = max(1, int(plan.warmup * plan.steps))
    return min(1.0, (step + 1) / rise) * 0.5 * (1 + math.cos(math.pi * step / plan.steps))


def _finite(half: Half) -> Half | None:
    return half if math.isfinite(sum(half.position.loss)) else None


def _check_acts(runner: Runner, judge: Half, reset: Half | None) -> None:
    moved = any(not weights.is_identity() for weights in runner.levels)
    if moved and reset is not None and judge.position.loss == reset.position.loss:
        raise TrialError(
            f"the arm {runner.arm.name!r} was trained, but with all level weights put back to 1 its loss is the same "
            "to the last bit: its level weights have no effect. Run `llcompile doctor`"
        )
