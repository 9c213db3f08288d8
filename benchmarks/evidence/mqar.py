"""Multi-query associative recall as in zoology (arXiv 2312.04927), drawn on any device.

`first`, zoology's own: all pairs `key value` come first. The queries, each key once, follow in the slots of two tokens
that are left, whose number is drawn without replacement with a probability of gap^(power - 1). All tokens that are
left are drawn from the whole vocabulary. Keys are the lower half of the vocabulary and values the upper one; no key
and no value comes twice. `stream`, not in zoology: pairs and queries share the sequence. Each pair stands anywhere, and
its query is an octave of slots behind it: 1, 2-3, 4-7, …

With `told`, a key tells the octave of its distance: keys are split into as many classes as there are octaves, and a
pair takes a key of its class. Otherwise the token that asks says nothing about where the answer stands.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

POWER = 0.01  # zoology's power_a


class Batch(NamedTuple):
    """tokens [B, T]; where the queries stand, their answers and the octaves of their distances, each [B, P].

    A query that found no room (`stream` only) has the answer -100.
    """

    tokens: Tensor
    places: Tensor
    answers: Tensor
    octaves: Tensor


@dataclass(frozen=True)
class Task:
    """The sizes: tokens T, pairs P, vocabulary; the layout, and whether keys tell distances."""

    length: int
    pairs: int
    vocabulary: int
    layout: str = "first"
    told: bool = False

    @property
    def slots(self) -> int:
        """How many pairs and queries there is room for."""
        return self.length // 2

    @property
    def octaves(self) -> int:
        """How many octaves of distance there are, counted in slots."""
        return (self.slots - 1).bit_length()

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        """`count` fresh sequences on the generator's device."""
        starts, ends = (self._first if self.layout == "first" else self._stream)(count, generator)
        found, distances = starts >= 0, (ends - starts).clamp(min=1)
        octaves = distances.double().log2().floor().long()
        half = self.vocabulary // 2
        keys, values = self._keys(octaves, generator), half + _some(count, half, self.pairs, generator)
        tokens = torch.randint(self.vocabulary, (count, self.length + 2), generator=generator, device=generator.device)
        # A pair without room goes to a slot past the end.
        starts, ends = (2 * torch.where(found, x, self.slots) for x in (starts, ends))
        tokens.scatter_(1, starts, keys).scatter_(1, starts + 1, values).scatter_(1, ends, keys)
        return Batch(tokens[:, : self.length], torch.where(found, ends, 0), torch.where(found, values, -100), octaves)

    def _keys(self, octaves: Tensor, generator: torch.Generator) -> Tensor:
        """A key for each pair [B, P], none twice in a sequence; token 0 is no key, as in zoology."""
        keys = self.vocabulary // 2 - 1
        if not self.told:
            return 1 + _some(len(octaves), keys, self.pairs, generator)
        return 1 + octaves + self.octaves * _some(len(octaves), keys // self.octaves, self.pairs, generator)

    def _first(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        space = self.slots - self.pairs
        gaps = torch.arange(1, space + 1, dtype=torch.float64, device=generator.device) ** (POWER - 1)
        # The smallest of exponential times are a draw without replacement, as np.random.choice makes it.
        times = torch.empty(count, space, dtype=torch.float64, device=generator.device)
        times.exponential_(generator=generator)
        starts = torch.arange(self.pairs, device=generator.device).expand(count, self.pairs)
        return starts, self.pairs + (times / gaps).topk(self.pairs, largest=False).indices

    def _stream(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        device, shape = generator.device, (count, self.pairs)
        nearest = 2 ** torch.randint(self.octaves, shape, generator=generator, device=device)
        distances = nearest + (_rand(shape, generator) * nearest).long()
        slots, starts = torch.arange(self.slots, device=device), torch.full(shape, -1, device=device)
        free = torch.ones(count, self.slots + 1, dtype=torch.bool, device=device)
        free[:, -1] = False  # stands for all slots past the end
        for column in range(self.pairs):
            ends = (slots + distances[:, column : column + 1]).clamp(max=self.slots)
            possible = free[:, :-1] & free.gather(1, ends)
            start = _rand((count, self.slots), generator).masked_fill(~possible, -1).argmax(1, keepdim=True)
            room = possible.gather(1, start)
            for place in (start, ends.gather(1, start)):
                free.scatter_(1, place, free.gather(1, place) & ~room)
            starts[:, column : column + 1] = torch.where(room, start, -1)
        return starts, starts + distances


def _some(count: int, of: int, some: int, generator: torch.Generator) -> Tensor:
    """`some` different numbers below `of` in each of `count` rows."""
    return _rand((count, of), generator).topk(some, dim=1).indices


def _rand(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device)
