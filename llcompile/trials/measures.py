"""Measures: loss and right answers on held-out sequences, by position and by distance, in two halves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llcompile.trials.batches import IGNORED, Batch

_PARTS = 4  # bins inside of the training length, and as many beyond it
_OCTAVES = 32
CHOOSE, JUDGE = 0, 1
Slices = Sequence[int]


@dataclass(frozen=True)
class Sums:
    """Sums over labels, by bin: of the loss in nats, of right answers, and of ones."""

    loss: tuple[float, ...]
    right: tuple[float, ...]
    count: tuple[int, ...]

    def value(self, metric: str, bins: Slices | None = None) -> float | None:
        """The mean of "loss" or "accuracy" over some bins (None: all); None where there is no label, or no answer."""
        chosen = range(len(self.count)) if bins is None else bins
        count = sum(self.count[i] for i in chosen)
        sums = self.loss if metric == "loss" else self.right
        return sum(sums[i] for i in chosen) / count if count and sums else None


@dataclass(frozen=True)
class Half:
    """What one half of the held-out sequences gave: by position, and by octave of distance (2^n to 2^(n+1) - 1)."""

    position: Sums
    distance: Sums

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers."""
        return asdict(self)

    @classmethod
    def of(cls, given: dict[str, Any]) -> Half:
        """From what `to_dict` gave, by way of JSON or not."""
        return cls(*(Sums(**{k: tuple(v) for k, v in given[name].items()}) for name in ("position", "distance")))


def edges(trained: int, longest: int) -> tuple[int, ...]:
    """The bounds of the bins of positions: four inside the training length, and four beyond it, if there are any."""
    inside = min(trained, longest)
    bounds = [inside * i // _PARTS for i in range(_PARTS + 1)]
    bounds += [trained + (longest - trained) * i // _PARTS for i in range(1, _PARTS + 1)] if longest > trained else []
    return tuple(dict.fromkeys(bounds))


def bins_of(bounds: Sequence[int], trained: int) -> dict[str, tuple[int, ...]]:
    """Which bins belong to "inside", "beyond" and "all" positions."""
    every = tuple(range(len(bounds) - 1))
    inside = tuple(i for i in every if bounds[i + 1] <= trained)
    return {"inside": inside, "beyond": every[len(inside) :], "all": every}


def measure(run: Callable[[Batch], Tensor], batches: Iterable[Batch], bounds: Sequence[int]) -> list[Half]:
    """Both halves: sequences take turns. `run` gives logits [B, T, vocabulary]."""
    halves = [_Counter(len(bounds) - 1), _Counter(len(bounds) - 1)]
    for batch in batches:
        logits = run(batch).detach().float()
        for number, half in enumerate(halves):
            rows = slice(number, None, 2)
            half.add(logits[rows], batch.labels[rows], None if batch.distance is None else batch.distance[rows], bounds)
    return [half.half() for half in halves]


def measure_own(run: Callable[[Batch], Tensor], batches: Sequence[Batch]) -> list[Half]:
    """As `measure`, for a loss of the user's that is one number a batch: batches take turns."""
    halves = []
    for number in (CHOOSE, JUDGE):
        losses = [float(run(batch).detach()) for batch in batches[number::2]]
        halves.append(Half(Sums((sum(losses),), (), (len(losses),)), Sums((), (), ())))
    return halves


class _Counter:
    """Sums in float64, on the CPU."""

    def __init__(self, bins: int) -> None:
        self.position = torch.zeros(3, bins, dtype=torch.float64)
        self.distance = torch.zeros(3, _OCTAVES, dtype=torch.float64)

    def add(self, logits: Tensor, labels: Tensor, distance: Tensor | None, bounds: Sequence[int]) -> None:
        asked = labels != IGNORED
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
        loss = loss.view_as(labels)[asked].double().cpu()
        right = (logits.argmax(-1) == labels)[asked].double().cpu()
        at = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)[asked].cpu()
        _add(self.position, torch.bucketize(at, torch.tensor(bounds[1:-1]), right=True), loss, right)
        if distance is not None:
            far = distance[asked].cpu()
            known = far > 0
            octave = far[known].double().log2().floor().long().clamp(max=_OCTAVES - 1)
            _add(self.distance, octave, loss[known], right[known])

    def half(self) -> Half:
        last = int((self.distance[2] > 0).nonzero().max()) + 1 if bool(self.distance[2].any()) else 0
        return Half(_sums(self.position), _sums(self.distance[:, :last]))


def _add(sums: Tensor, bins: Tensor, loss: Tensor, right: Tensor) -> None:
    for row, weights in zip(sums, (loss, right, torch.ones_like(loss)), strict=True):
        row += torch.bincount(bins, weights, minlength=sums.shape[1])


def _sums(sums: Tensor) -> Sums:
    return Sums(tuple(sums[0].tolist()), tuple(sums[1].tolist()), tuple(int(n) for n in sums[2].tolist()))
