"""Multi-query associative recall: key-value pairs stream by, and a key that comes again asks for its value.

A sequence is cut into slots of two tokens. A *pair* slot is `key value`; a *query* slot is `key blank`, and the model
is to say the value in place of the blank. Every key is bound at most once in a sequence and asked for at most once.

How far back a value lies, counted in slots, is drawn from octaves: 1, 2-3, 4-7, … With `distances="key"` the octave is
a property of the key, the same in all sequences, as in text, where some words point back by a line and some by a
chapter. With `distances="any"` it is drawn anew each time, so that a query says nothing about where its value lies.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

DISTANCES = ("key", "any")
IGNORED = -100  # what cross_entropy leaves out


class Batch(NamedTuple):
    """Sequences [B, T], the answers [B, T] (IGNORED except at queries), and each query's octave [B, T] (or IGNORED)."""

    tokens: Tensor
    answers: Tensor
    octaves: Tensor

    def split(self, size: int) -> Iterator[Batch]:
        """The same sequences in batches of `size`."""
        return map(Batch, self.tokens.split(size), self.answers.split(size), self.octaves.split(size))


@dataclass(frozen=True)
class Task:
    """The sizes of the task. `pairs` is an upper bound: a pair whose two slots find no room is left out."""

    length: int = 128
    pairs: int = 30
    keys: int = 60
    values: int = 16
    distances: str = "key"

    @property
    def slots(self) -> int:
        """How many pairs and queries there is room for."""
        return self.length // 2

    @property
    def octaves(self) -> int:
        """How many octaves of distance there are; the longest distances are half a sequence."""
        return max(1, (self.slots - 1).bit_length() - 1)

    @property
    def blank(self) -> int:
        """The token that follows a query and fills unused slots."""
        return self.keys + self.values

    @property
    def vocabulary(self) -> int:
        """Keys, values and the blank."""
        return self.keys + self.values + 1

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        """`count` fresh sequences."""
        keys = _rand(generator, count, self.keys).argsort(1)[:, : self.pairs]
        values = self.keys + torch.randint(self.values, keys.shape, generator=generator)
        drawn = torch.randint(self.octaves, keys.shape, generator=generator)
        octaves = keys % self.octaves if self.distances == "key" else drawn
        nearest = 2**octaves
        distances = nearest + (_rand(generator, *keys.shape) * nearest).long()
        starts = self._place(distances, generator)
        return self._write(keys, values, octaves, starts, starts + distances)

    def stream(self, batch: int, seed: int) -> Iterator[Batch]:
        """Fresh batches without end; the same ones for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        while True:  # many at once: drawing is a loop over pairs, however many sequences there are
            yield from self.draw(batch * 64, generator).split(batch)

    def _place(self, distances: Tensor, generator: torch.Generator) -> Tensor:
        """For each pair a free slot whose partner, `distances` further on, is free as well; -1 where there is none."""
        count, slots = len(distances), torch.arange(self.slots)
        free = torch.ones(count, self.slots, dtype=torch.bool)
        starts = torch.full_like(distances, -1)
        for column in distances.argsort(1, descending=True).split(1, dim=1):  # long distances are the hardest to place
            ends = slots + distances.gather(1, column)
            inside = ends < self.slots
            possible = free & inside & free.gather(1, ends.clamp(max=self.slots - 1))
            start = _rand(generator, count, self.slots).masked_fill(~possible, -1).argmax(1, keepdim=True)
            found = possible.gather(1, start)
            end = torch.where(found, ends.gather(1, start), start)
            free.scatter_(1, start, free.gather(1, start) & ~found)
            free.scatter_(1, end, free.gather(1, end) & ~found)
            starts.scatter_(1, column, torch.where(found, start, -1))
        return starts

    def _write(self, keys: Tensor, values: Tensor, octaves: Tensor, starts: Tensor, ends: Tensor) -> Batch:
        tokens = torch.full((len(keys), self.length), self.blank)
        answers, asked = torch.full_like(tokens, IGNORED), torch.full_like(tokens, IGNORED)
        row, pair = (starts >= 0).nonzero(as_tuple=True)
        key, value = keys[row, pair], values[row, pair]
        start, end = 2 * starts[row, pair], 2 * ends[row, pair]
        tokens[row, start], tokens[row, start + 1], tokens[row, end] = key, value, key
        answers[row, end], asked[row, end] = value, octaves[row, pair]
        return Batch(tokens, answers, asked)


@dataclass(frozen=True)
class Accuracy:
    """The share of right answers: over all queries, and for each octave of distance."""

    overall: float
    by_octave: tuple[float, ...]
    queries: int


class Exam:
    """Held-out sequences, the same for every model that is asked."""

    def __init__(self, task: Task, sequences: int = 256, batch: int = 16) -> None:
        # A CPU's generator takes 32 bits of it, so 0; trainings draw by other numbers, and none sees these sequences.
        seed = 2**40
        self.task = task
        self.batches = list(task.draw(sequences, torch.Generator().manual_seed(seed)).split(batch))

    def accuracy(self, logits: list[Tensor]) -> Accuracy:
        """The accuracy of a model's logits, one tensor [B, T, vocabulary] for each of `self.batches`."""
        right, octaves = [], []
        for batch, scores in zip(self.batches, logits, strict=True):
            asked = batch.answers != IGNORED
            right.append(scores.argmax(-1)[asked] == batch.answers[asked])
            octaves.append(batch.octaves[asked])
        hit, octave = torch.cat(right).double(), torch.cat(octaves)
        shares = tuple(hit[octave == number].mean().item() for number in range(self.task.octaves))
        return Accuracy(hit.mean().item(), shares, len(hit))


def _rand(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=generator)
