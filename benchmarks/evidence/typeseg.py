"""Weights that others have trained: typeseg's Mamba-1 on long documents, glued from source files.

A share is a seed, which draws the training documents and nothing else: all seeds start from the same weights and are
measured on the same held-out documents. "as it is" is the package's model, without any training.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.evidence.files import TYPES, Files
from benchmarks.evidence.store import Store
from benchmarks.evidence.training import ARMS, Arm, Rates, Student, fit
from benchmarks.evidence.worker import Job

SEEDS = 5
AS_IT_IS = "as it is"
# Ordered so that little time gives something: level weights alone against staying first.
ORDER = ("linear alone", "staying", "routed alone", "all, linear", "all, routed")


@dataclass(frozen=True)
class Plan:
    """Sizes, steps and rates.

    Args:
        length: tokens of a document, an excerpt of `excerpts` tokens after the other.
        files: of each type, at most.
        bins: parts of a document that the accuracy is measured in.
    """

    length: int = 2048
    excerpts: tuple[int, int] = (48, 640)
    files: int = 300
    steps: int = 100
    batch: int = 8
    tests: int = 64
    bins: int = 8
    rates: Rates = field(default_factory=lambda: Rates(levels=1e-2, others=3e-4))


LARGE = Plan()
SMALL = replace(LARGE, length=128, excerpts=(16, 64), files=20, steps=2, batch=2, tests=4, bins=4)


class Documents:
    """Documents of excerpts of files, and the type that each of their characters comes from."""

    def __init__(self, plan: Plan, labels: list[str], held_out: bool) -> None:
        self.plan = plan
        files = Files(tuple(TYPES), held_out, plan.files).texts
        self.types = {labels.index(label): texts for label, texts in files.items()}

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Tokens and labels, each [count, T]."""
        drawn = [self._one(generator) for _ in range(count)]
        return torch.stack([tokens for tokens, _ in drawn]), torch.stack([labels for _, labels in drawn])

    def _one(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        tokens: list[Tensor] = []
        labels: list[Tensor] = []
        while sum(map(len, tokens)) < self.plan.length:
            label, excerpt = self._excerpt(generator)
            tokens.append(excerpt)
            labels.append(torch.full_like(excerpt, label))
        return torch.cat(tokens)[: self.plan.length], torch.cat(labels)[: self.plan.length]

    def _excerpt(self, generator: torch.Generator) -> tuple[int, Tensor]:
        from typeseg_torch.model import encode

        def below(most: int) -> int:
            return int(torch.randint(most, (), generator=generator))

        label = list(self.types)[below(len(self.types))]
        text = self.types[label][below(len(self.types[label]))]
        least, most = self.plan.excerpts
        wanted = int(least * (most / least) ** float(torch.rand((), generator=generator)))
        start = below(max(1, len(text) - wanted))
        return label, encode(text[start : start + wanted].decode("utf-8", "ignore"))


def shares(small: bool) -> list[str]:
    """The names of the shares."""
    return [f"seed-{seed}" for seed in range(1 if small else SEEDS)]


def work(job: Job) -> None:
    """Everything of one seed."""
    plan, seed = SMALL if job.small else LARGE, int(job.share.partition("-")[2])
    _find_example()
    from typeseg_torch.model import pretrained

    store = Store(job.folder, job.share, {**asdict(plan), "seed": seed}, job.device)
    model, labels = pretrained()
    bench = Bench(job, plan, model.state_dict(), labels, seed)
    for name in ORDER:
        arm = next(arm for arm in ARMS if arm.name == name)
        if arm.name not in store:
            bench.run(store, arm)
            print(f"{arm.name}: {store[arm.name]['accuracy']:.4f}", flush=True)


class Bench:
    """The documents, and what each arm is tried with."""

    def __init__(self, job: Job, plan: Plan, checkpoint: dict[str, Tensor], labels: list[str], seed: int) -> None:
        self.job, self.plan, self.checkpoint, self.seed = job, plan, checkpoint, seed
        self.students: dict[str | None, Student] = {}
        self.documents = Documents(plan, labels, held_out=False)
        exam = Documents(plan, labels, held_out=True)
        self.names = [labels[label] for label in exam.types]
        self.exam = exam.draw(plan.tests, torch.Generator().manual_seed(2**40))

    def run(self, store: Store, arm: Arm) -> None:
        """Convert if the arm does, measure, train, measure again."""
        student = self._student(arm.levels)
        student.load(self.checkpoint)
        start = self._outputs(student)
        if AS_IT_IS not in store:
            store.put(AS_IT_IS, {**self._score(start), "types": self.names})
        ms = fit(self.job, self._loss(student), student.groups(arm, self.plan.rates), self.plan.steps)
        found = {**self._score(self._outputs(student)), "at_conversion": self._score(start), "ms_per_step": ms}
        student.reset_levels()
        store.put(arm.name, {**found, "levels_put_back": self._score(self._outputs(student))["accuracy"]})

    def _student(self, levels: str | None) -> Student:
        """The model with level weights of this kind, converted and compiled when it is asked for first."""
        from typeseg_torch.model import pretrained

        if levels not in self.students:
            model = pretrained()[0].to(self.job.device)
            example = self.exam[0][:2, :64].to(self.job.device)  # short: typeseg's own scan is a loop over tokens
            self.students[levels] = Student(model, (example,), levels, self.plan.length, "eager")
        return self.students[levels]

    def _loss(self, student: Student) -> Any:
        generator = torch.Generator().manual_seed(self.seed)
        batches = _ahead(self.documents, self.plan, generator)

        def loss(step: int) -> Tensor:
            tokens, labels = (x.to(self.job.device) for x in next(batches))
            return F.cross_entropy(student(tokens).flatten(0, 1), labels.flatten())

        return loss

    def _outputs(self, student: Student) -> Tensor:
        """The label that the model gives each character of the held-out documents [D, T]."""
        batches = self.exam[0].split(self.plan.batch)
        return torch.cat([student(tokens.to(self.job.device)).detach().argmax(-1).cpu() for tokens in batches])

    def _score(self, found: Tensor) -> dict[str, Any]:
        right = (found == self.exam[1]).double()
        return {
            "accuracy": float(right.mean()),
            "by_position": [float(part.mean()) for part in right.chunk(self.plan.bins, dim=1)],
        }


def _ahead(documents: Documents, plan: Plan, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield documents.draw(plan.batch, generator)


def _find_example() -> None:
    """Put the folder of the examples where Python looks for modules."""
    folder = str(Path(__file__).resolve().parents[2] / "examples")
    if folder not in sys.path:
        sys.path.append(folder)
