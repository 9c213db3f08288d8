"""Byte-level language models: trained on Python sources, frozen, then uptrained in several ways at equal tokens.

A share is a family. Its model is trained once and kept beside the results; all arms start from that file. The sizes
are such that a calm core of a CPU needs an hour and a half for both families, and a GPU some minutes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.evidence import models
from benchmarks.evidence.files import Files
from benchmarks.evidence.needles import TASKS, Corpus, asked, planted
from benchmarks.evidence.passing import with_state
from benchmarks.evidence.store import Store
from benchmarks.evidence.training import STAYING, Arm, Rates, Student, fit
from benchmarks.evidence.worker import Job

BYTES = 256
TRAINED = "trained"
_KEPT = 64  # of so many losses of the first texts one is kept, to compare with those after the conversion


@dataclass(frozen=True)
class Way:
    """An arm, whether it is trained on long texts, and whether each batch begins with the states of the one before.

    `rate` is the level weights' peak, in place of the plan's.
    """

    arm: Arm
    long: bool
    passing: bool = False
    rate: float | None = None


# Ordered so that little time gives something.
WAYS = (
    Way(Arm("staying, long texts", None, True), long=True),
    Way(Arm("state passing", None, True), long=False, passing=True),
    Way(Arm("all, routed, rate 1e-3", "routed", True), long=True, rate=1e-3),
    Way(Arm("all, linear, rate 1e-3", "linear", True), long=True, rate=1e-3),
    Way(Arm("routed alone, rate 1e-3", "routed", False), long=True, rate=1e-3),
    Way(Arm("linear alone, rate 1e-3", "linear", False), long=True, rate=1e-3),
    Way(Arm("staying", None, True), long=False),
    Way(Arm("all, routed", "routed", True), long=True),
    Way(Arm("routed alone", "routed", False), long=True),
)


@dataclass(frozen=True)
class Plan:
    """Sizes, steps and rates.

    Args:
        length: tokens of the texts that a model is trained on; `long` those of uptraining on long texts.
        longest: tokens of the texts that the loss is measured on.
        tokens: of a batch, whatever the length.
        steps: before the conversion; `more` after it.
        needles: share of the texts that hold needles, in each training.
        texts: held-out texts for the loss, and for each task of needles.
        questions: lengths of the texts with needles.
    """

    sizes: dict[str, models.Sizes]
    length: int = 256
    long: int = 1024
    longest: int = 2048
    tokens: int = 4096
    steps: int = 600
    more: int = 80
    needles: float = 0.25
    texts: int = 32
    questions: tuple[int, ...] = (256, 1024)
    files: int = 4000
    rate: float = 2e-3
    after: Rates = field(default_factory=lambda: Rates(levels=1e-2, others=5e-4))


LARGE = Plan(
    {
        "mamba2": models.Sizes(256, layers=5, heads=8, key_dim=64, value_dim=64, vocabulary=BYTES),
        "gdn": models.Sizes(256, layers=3, heads=4, key_dim=32, value_dim=64, vocabulary=BYTES),
    }
)
SMALL = replace(
    LARGE,
    sizes={
        name: replace(sizes, hidden=32, layers=1, heads=2, key_dim=8, value_dim=16)
        for name, sizes in LARGE.sizes.items()
    },
    long=512,
    longest=512,
    tokens=1024,
    steps=4,
    more=2,
    texts=4,
    questions=(256,),
    files=40,
)


def shares(small: bool) -> list[str]:
    """The names of the shares."""
    return list(models.FAMILIES)


def work(job: Job) -> None:
    """Everything of one family."""
    plan = SMALL if job.small else LARGE
    sizes = plan.sizes[job.share]
    store = Store(job.folder, job.share, {**asdict(plan), "sizes": asdict(sizes), "family": job.share}, job.device)
    bench = Bench(job, plan)
    bench.pretrain(store)
    for way in WAYS:
        if way.arm.name not in store:
            bench.run(store, way)
            print(f"{way.arm.name}: {store[way.arm.name]['loss']}", flush=True)


class Bench:
    """The texts, the checkpoint, and what each way is tried with."""

    def __init__(self, job: Job, plan: Plan) -> None:
        self.job, self.plan, self.family = job, plan, job.share
        self.train, self.exam = (
            Corpus(Files(("python",), held_out, limit).texts["python"], job.device)
            for held_out, limit in ((False, plan.files), (True, plan.files // 4))
        )
        self.file = job.folder / f"{job.share}.safetensors"
        self.students: dict[str | None, Student] = {}

    def pretrain(self, store: Store) -> None:
        """Train the model that plays the pretrained one, unless its file is there."""
        from safetensors.torch import save_file

        if self.file.exists() and TRAINED in store:
            return
        student = self._student(None)
        groups = student.groups(STAYING, Rates(0.0, self.plan.rate))
        loss = self._loss(student, self.plan.length, seed=1)
        ms = fit(self.job, loss, groups, self.plan.steps)
        # Half of the bytes; what is measured from here on is the rounded model.
        save_file({name: tensor.bfloat16().contiguous() for name, tensor in student.state().items()}, self.file)
        student.load(self._checkpoint())
        found = {
            "steps": self.plan.steps,
            "ms_per_step": ms,
            "parameters": models.count(student.module),
            "bytes": self.file.stat().st_size,
        }
        store.put(TRAINED, {**found, **self._measured(student)})

    def run(self, store: Store, way: Way) -> None:
        """Convert if the way does, uptrain and measure."""
        student = self._student(way.arm.levels)
        student.load(self._checkpoint())
        moved = self._losses(student, 4)[:, ::_KEPT].sub(torch.tensor(store[TRAINED]["first"])).abs().max()
        length = self.plan.long if way.long else self.plan.length
        loss = self._passed(student.module) if way.passing else self._loss(student, length, seed=2)
        # A cache is written in place, and autograd has saved what it held.
        with torch.autograd.graph.allow_mutation_on_saved_tensors() if way.passing else nullcontext():
            rates = replace(self.plan.after, levels=way.rate or self.plan.after.levels)
            ms = fit(self.job, loss, student.groups(way.arm, rates), self.plan.more)
        found = {"ms_per_step": ms, "tokens": self.plan.more * self.plan.tokens, "length": length}
        found |= {"moved_at_conversion": float(moved), **self._measured(student)}
        student.reset_levels()
        store.put(way.arm.name, {**found, "levels_put_back": float(self._losses(student, self.plan.texts).mean())})

    def _student(self, levels: str | None) -> Student:
        """The model with level weights of this kind, converted and compiled when it is asked for first."""
        if levels not in self.students:
            model = models.make(self.family, self.plan.sizes[self.family], seed=0).to(self.job.device)
            example = torch.randint(BYTES, (2, 64), device=self.job.device)
            self.students[levels] = Student(
                model, (example,), levels, self.plan.longest, "eager", dynamic=True, use_cache=False
            )
        return self.students[levels]

    def _checkpoint(self) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        return {name: tensor.float().to(self.job.device) for name, tensor in load_file(self.file).items()}

    def _batches(self, length: int, seed: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            windows = self.train.windows(self.plan.tokens // length, length, generator)
            yield planted(self.train, windows, self.plan.needles, generator)

    def _loss(self, student: Student, length: int, seed: int) -> Callable[[int], Tensor]:
        batches = self._batches(length, seed)

        def loss(step: int) -> Tensor:
            tokens = next(batches)
            return F.cross_entropy(student(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

        return loss

    def _passed(self, model: torch.nn.Module) -> Callable[[int], Tensor]:
        """The loss of short texts, each batch from the states that the batch before has left (arXiv 2507.02782)."""
        batches, states = self._batches(self.plan.length, 2), None

        def loss(step: int) -> Tensor:
            nonlocal states
            tokens = next(batches)
            logits, states = with_state(model, tokens, states)
            return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

        return loss

    def _measured(self, student: Student) -> dict[str, Any]:
        """The loss by position, nats per byte, and for each task and length the answers that are right."""
        losses = self._losses(student, self.plan.texts)
        ends = [2**power for power in range(6, (self.plan.longest - 1).bit_length() + 1)]
        parts = [losses[:, begin:end].mean() for begin, end in zip([0, *ends], ends, strict=False)]
        answers = {
            name: {str(length): self._answered(student, name, length) for length in self.plan.questions}
            for name in TASKS
        }
        return {
            "ends": ends,
            "loss": [round(float(part), 4) for part in parts],
            "first": losses[:4, ::_KEPT].tolist(),
            "needles": answers,
        }

    def _losses(self, student: Student, count: int) -> Tensor:
        """The loss at each position of the first held-out texts [count, T - 1]."""
        texts = self.exam.inside(self.plan.texts, self.plan.longest, torch.Generator().manual_seed(3))[:count]
        found = []
        for tokens in texts.split(4):
            logits = student(tokens).logits.detach()[:, :-1]  # not under no_grad, which would be another graph
            found.append(F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").cpu())
        return torch.cat(found)

    def _answered(self, student: Student, name: str, length: int) -> dict[str, float]:
        """The share of answers whose bytes are all right, and the share of bytes, each given the ones before."""
        exam = asked(self.exam, TASKS[name], self.plan.texts, length, torch.Generator().manual_seed(4))
        right = []
        for tokens, values in zip(exam.tokens.split(16), exam.values.split(16), strict=True):
            hit = student(tokens).logits.detach()[:, :-1].argmax(-1) == tokens[:, 1:]
            right.append(hit[values[:, 1:]].unflatten(0, (len(tokens), -1)).cpu())
        whole = torch.cat(right).double()
        return {"answers": float(whole.prod(1).mean()), "bytes": float(whole.mean())}
