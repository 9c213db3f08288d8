"""Recall: a trained linear model, converted, against the same model trained further.

A share is a series and a seed. Untold distances come before told ones, zoology's layout before ours.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.evidence import models
from benchmarks.evidence.mqar import Batch, Task
from benchmarks.evidence.store import Store
from benchmarks.evidence.training import ARMS, STAYING, Arm, Rates, Student, fit
from benchmarks.evidence.worker import Job

SEEDS = 5


@dataclass(frozen=True)
class Plan:
    """Sizes, steps and rates.

    Args:
        steps, more: training steps before and after the conversion.
        rate: peak learning rate before the conversion; `after` those after it.
        tests: held-out sequences, the same for all seeds.
    """

    task: Task
    sizes: models.Sizes
    steps: int
    more: int
    batch: int
    rate: float
    after: Rates
    tests: int = 512


LARGE = Plan(
    Task(length=64, pairs=14, vocabulary=256),
    models.Sizes(hidden=64, layers=1, heads=1, key_dim=4, value_dim=64, vocabulary=256, step=(0.02, 0.2), slow=True),
    steps=3000,
    more=1500,
    batch=64,
    rate=5e-3,
    after=Rates(levels=2e-2, others=3e-3),
)
SMALL = replace(LARGE, steps=30, more=10, batch=8, tests=32)
# In the order of their importance.
TASKS = (("stream", False), ("first", False), ("stream", True), ("first", True))


@dataclass(frozen=True)
class Series:
    """What all seeds of a row of the table share: a family of models, a plan, tasks of `TASKS` and arms."""

    family: str
    title: str
    plan: Plan = LARGE
    tasks: tuple[tuple[str, bool], ...] = TASKS
    arms: tuple[Arm, ...] = ARMS


SERIES = {
    **{family: Series(family, title) for family, title in models.FAMILIES.items()},
    # Within 3,000 steps some seeds do not learn the task: what is not learned has nothing to convert.
    "gdn_longer": Series(
        "gdn",
        "gated delta, trained for longer before",
        replace(LARGE, steps=8000),
        tasks=TASKS[:1],
        arms=tuple(arm for arm in ARMS if arm.all_weights),
    ),
    # Routing is learned slowly: its gain over staying grows for as long as was tried.
    "mamba2_longer": Series(
        "mamba2",
        "scalar decay, trained for longer after",
        replace(LARGE, more=4500),
        tasks=TASKS[:1],
        arms=(ARMS[0], ARMS[-1]),
    ),
}


def series_of(plan: dict[str, Any]) -> str:
    """The name of the series that a file's plan is of."""
    return str(plan.get("series", plan["family"]))


def shares(small: bool) -> list[str]:
    """The names of the shares."""
    return [f"{series}-{seed}" for seed in range(1 if small else SEEDS) for series in SERIES]


def work(job: Job) -> None:
    """Everything of one share."""
    name, _, seed = job.share.partition("-")
    series = SERIES[name]
    plan = SMALL if job.small else series.plan
    # Files of before there were series have no entry of this name, and stay valid.
    named = {} if name == series.family else {"series": name}
    store = Store(
        job.folder, job.share, {**asdict(plan), "family": series.family, **named, "seed": int(seed)}, job.device
    )
    bench = Bench(job, plan, series)
    for layout, told in series.tasks:
        bench.run(store, replace(plan.task, layout=layout, told=told), int(seed))


class Bench:
    """The models of a series, one for each kind of level weights, each compiled once for all tasks."""

    def __init__(self, job: Job, plan: Plan, series: Series) -> None:
        self.job, self.plan, self.family, self.arms = job, plan, series.family, series.arms
        self.inner = "inductor" if job.device == "cpu" and not job.small else "eager"
        self.heads: dict[str | None, torch.nn.Module] = {}
        self.students: dict[str | None, Student] = {}

    def student(self, levels: str | None) -> Student:
        """The model with level weights of this kind, made when it is asked for first."""
        if levels not in self.students:
            model = models.make(self.family, self.plan.sizes, seed=0).to(self.job.device)
            self.heads[levels] = model.get_submodule("lm_head")
            example = torch.randint(self.plan.sizes.vocabulary, (2, self.plan.task.length), device=self.job.device)
            base: Any = model.base_model
            self.students[levels] = Student(
                base, (example,), levels, self.plan.task.length, self.inner, use_cache=False
            )
        return self.students[levels]

    def run(self, store: Store, task: Task, seed: int) -> None:
        """Train, convert and go on in every way, as far as it has not been done."""
        name = f"{task.layout}, {'told' if task.told else 'untold'}"
        if all(f"{name}: {arm.name}" in store for arm in self.arms):
            return
        exam = held_out(task, self.plan.tests, self.job.device)
        checkpoint = self._trained(task, seed)
        before = self._outputs(None, exam)
        store.put(f"{name}: trained", score(before, exam, task))
        for arm in self.arms:
            if f"{name}: {arm.name}" not in store:
                store.put(f"{name}: {arm.name}", self._arm(arm, task, exam, checkpoint, before, seed))
                print(f"{name}: {arm.name}: {store[f'{name}: {arm.name}']['accuracy']:.3f}", flush=True)

    def _trained(self, task: Task, seed: int) -> dict[str, Any]:
        """The linear model, trained; returns its weights and its head's."""
        student = self.student(None)
        fresh: Any = models.make(self.family, self.plan.sizes, seed).to(self.job.device)
        self._load(None, {"base": fresh.base_model.state_dict(), "head": fresh.lm_head.state_dict()})
        rates = Rates(levels=0.0, others=self.plan.rate)
        groups = student.groups(STAYING, rates, self.heads[None].parameters())
        fit(self.job, self._loss(None, task, 2 * seed), groups, self.plan.steps)
        head = {key: tensor.detach().clone() for key, tensor in self.heads[None].state_dict().items()}
        return {"base": student.state(), "head": head}

    def _arm(self, arm: Arm, task: Task, exam: Batch, checkpoint: Any, before: Tensor, seed: int) -> dict[str, Any]:
        student = self.student(arm.levels)
        self._load(arm.levels, checkpoint)
        start = self._outputs(arm.levels, exam)
        moved = float((start - before).abs().max() / before.abs().max())
        groups = student.groups(arm, self.plan.after, self.heads[arm.levels].parameters())
        ms = fit(self.job, self._loss(arm.levels, task, 2 * seed + 1), groups, self.plan.more)
        result = score(self._outputs(arm.levels, exam), exam, task)
        student.reset_levels()
        without = score(self._outputs(arm.levels, exam), exam, task)["accuracy"]
        return {**result, "moved_at_conversion": moved, "levels_put_back": without, "ms_per_step": ms}

    def _load(self, levels: str | None, checkpoint: Any) -> None:
        self.student(levels).load(checkpoint["base"])
        self.heads[levels].load_state_dict(checkpoint["head"])

    def _logits(self, levels: str | None, batch: Batch) -> Tensor:
        """The logits at the queries [B, P, vocabulary]."""
        hidden = self.student(levels)(batch.tokens).last_hidden_state
        asked = hidden.gather(1, batch.places.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
        logits: Tensor = self.heads[levels](asked)
        return logits

    def _loss(self, levels: str | None, task: Task, seed: int) -> Any:
        batches = stream(task, self.plan.batch, torch.Generator(self.job.device).manual_seed(seed))

        def loss(step: int) -> Tensor:
            batch = next(batches)
            return F.cross_entropy(self._logits(levels, batch).flatten(0, 1), batch.answers.flatten())

        return loss

    def _outputs(self, levels: str | None, exam: Batch) -> Tensor:
        """The logits of the held-out sequences, computed as in training, in batches of the same size."""
        batches = [Batch(*parts) for parts in zip(*(x.split(self.plan.batch) for x in exam), strict=True)]
        return torch.cat([self._logits(levels, batch).detach() for batch in batches])


def held_out(task: Task, count: int, device: str) -> Batch:
    """Sequences that no training sees: on a CPU, whose seeds have 32 bits, they are drawn by another number at once."""
    return task.draw(count, torch.Generator(device).manual_seed(2**40))


def stream(task: Task, batch: int, generator: torch.Generator) -> Any:
    """Fresh batches without end; many are drawn at once."""
    while True:
        drawn = task.draw(32 * batch, generator)
        for parts in zip(*(x.split(batch) for x in drawn), strict=True):
            yield Batch(*parts)


def score(logits: Tensor, exam: Batch, task: Task) -> dict[str, Any]:
    """The share of right answers: over all queries, and by octave of distance (None where there is no query)."""
    asked = exam.answers >= 0
    right = (logits.argmax(-1) == exam.answers)[asked].double()
    octave = exam.octaves[asked]
    shares = [right[octave == number] for number in range(task.octaves)]
    return {
        "accuracy": float(right.mean()),
        "by_octave": [float(share.mean()) if len(share) else None for share in shares],
    }
