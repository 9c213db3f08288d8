"""The experiment of the demo: train a linear model, convert it, go on in three ways."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

import llcompile
from demo.acting import Acting, change, check_acts, check_differs
from demo.models import recall_model
from demo.recall import Accuracy, Exam, Task
from demo.training import ARMS, Curve, Plan, Runner, learn
from llcompile.report import Report


class Watcher(Protocol):
    """What the experiment tells about its progress."""

    def stage(self, text: str, steps: int | None = None) -> Callable[[], None]:
        """A stage begins; the function that comes back is called after each of its steps (None: they aren't known)."""


@dataclass(frozen=True)
class Outcome:
    """What one seed gave. Arms are named as in `training.ARMS`; accuracies are measured on held-out sequences.

    Args:
        before: the linear model at the end of its training, run by Inductor as transformers wrote it.
        converted: the same weights run by the backend, every level weight 1.
        moved: how far the logits moved by conversion, max |difference| / max |logit|.
        acting: how the level weights act at conversion.
        learned: the curve before conversion.
        curves, after: for each arm its curve from the conversion on, and where it ended.
        without: for each converted arm, where it is with its level weights put back to 1.
    """

    seed: int
    before: Accuracy
    converted: Accuracy
    moved: float
    acting: Acting
    learned: Curve
    curves: dict[str, Curve]
    after: dict[str, Accuracy]
    without: dict[str, Accuracy]


class Bench:
    """Two compiled models, one linear and one converted, that serve all seeds: each is compiled once."""

    def __init__(self, task: Task, plan: Plan, inner: str = "inductor") -> None:
        self.task, self.plan = task, plan
        self.exam = Exam(task, batch=plan.batch)
        example = self.exam.batches[0].tokens
        self.report, self.linear, self.converted = _compiled(task, example, inner)

    def run(self, seed: int, watcher: Watcher) -> Outcome:
        """Everything for one seed.

        Raises:
            DemoError: the converted model does not depend on its level weights, before or after it was trained.
        """
        task, plan, linear, converted = self.task, self.plan, self.linear, self.converted
        linear.load(Runner(recall_model(task, seed)).state())
        done = watcher.stage("compiling the linear model (Inductor)")
        linear.accuracy(self.exam)
        done()
        tick = watcher.stage("training the linear model", plan.steps)
        groups = [{"params": list(linear.model.parameters()), "lr": plan.rate, "weight_decay": plan.weight_decay}]
        learned = learn(linear, self.exam, plan, groups, plan.steps, 2 * seed, tick)
        checkpoint = linear.state()
        converted.load(checkpoint)
        done = watcher.stage("compiling the converted model (loglinear)")
        before, same, moved = linear.accuracy(self.exam), converted.accuracy(self.exam), self._moved()
        acting = check_acts(converted.model, self._of(converted), "the converted model")
        done()
        seen = {"the same model before that training": self._of(linear)().detach()}
        curves, after, without = {}, {}, {}
        for arm in ARMS:
            runner = converted if arm.converted else linear
            runner.load(checkpoint)
            tick = watcher.stage(arm.name, plan.more)
            groups = arm.groups(runner.model, plan)
            curves[arm.name] = learn(runner, self.exam, plan, groups, plan.more, 2 * seed + 1, tick)
            after[arm.name] = runner.accuracy(self.exam)
            logits = self._of(runner)().detach()
            if arm.converted:
                runner.reset_levels()
                without[arm.name] = runner.accuracy(self.exam)
                check_differs(
                    arm.name, logits, {**seen, "its own with all level weights 1": self._of(runner)().detach()}
                )
            seen[arm.name] = logits
        return Outcome(seed, before, same, moved, acting, learned, curves, after, without)

    def _moved(self) -> float:
        return change(self._of(self.linear)(), self._of(self.converted)())

    def _of(self, runner: Runner) -> Callable[[], torch.Tensor]:
        return lambda: runner.logits(self.exam.batches[0].tokens)


def _compiled(task: Task, example: torch.Tensor, inner: str) -> tuple[Report, Runner, Runner]:
    options = {"levels": (task.length - 1).bit_length() + 1}
    model = recall_model(task)
    linear = Runner(model, torch.compile(model, backend=inner, dynamic=False))
    model = recall_model(task)
    report = llcompile.convert(model, example, use_cache=False, options=options)
    run = torch.compile(model, backend="loglinear", dynamic=False, options={**options, "inner": inner})
    return report, linear, Runner(model, run)
