"""The plan of a trial: what is trained, for how long, at which rates, and what would be worth a conversion."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from llcompile.errors import TrialError
from llcompile.options import INNER
from llcompile.weights.level_kinds import KINDS

METRICS = {"loss": 0.01, "accuracy": 0.005}  # what is worth a conversion where nothing else is said
PARTS = ("inside", "beyond", "all")
# Made to load published checkpoints. With fresh weights it is another parametrisation of `linear`.
_NOT_TRIED = ("paper",)


def kinds() -> tuple[str, ...]:
    """The kinds of level weights that a trial tries."""
    return tuple(name for name in KINDS if name not in _NOT_TRIED)


@dataclass(frozen=True)
class Plan:
    """The settings of a trial.

    Args:
        steps: optimizer steps of each run.
        seeds: a run of each arm for each of them; at least two.
        rates: peak learning rates of the model's own weights. With several, each arm that trains them is tried at each.
        level_rate: peak learning rate of level weights, for an input of up to 32 features; it falls as 32 / D.
        weight_decay: of the model's own weights; level weights have none, as it would pull them towards 1.
        warmup: share of the steps in which the rate rises; a cosine down to 0 follows.
        clip: largest norm of the gradient.
        kinds: kinds of level weights that are trained alone.
        all_kinds: kinds of level weights that are trained with all other weights.
        levels: number of levels; None for as many as the longest sequence has.
        inner: what compiles the models: "inductor", "aot_eager" or "eager".
        device: "cpu", "cuda" or None (a GPU where there is one).
        metric: what is judged, "loss" or "accuracy".
        part: which positions are judged: "inside" the training length, "beyond" it, or "all".
        worth: the least gain in the metric that would be worth a conversion (None: 0.01 nats, or 0.005 of accuracy).
        held_out: batches of held-out data, at most.
        workers: processes that train arms side by side.
    """

    steps: int = 400
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    rates: tuple[float, ...] = (1e-3,)
    level_rate: float = 3e-2
    weight_decay: float = 0.1
    warmup: float = 0.1
    clip: float = 1.0
    kinds: tuple[str, ...] = ()
    all_kinds: tuple[str, ...] = ()
    levels: int | None = None
    inner: str = "inductor"
    device: str | None = None
    metric: str = "loss"
    part: str = "inside"
    worth: float | None = None
    held_out: int = 16
    workers: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "kinds", tuple(self.kinds) or kinds())
        both = tuple(kind for kind in ("linear", "routed") if kind in self.kinds)
        object.__setattr__(self, "all_kinds", tuple(self.all_kinds) or both or self.kinds[:1])
        for name in ("seeds", "rates"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        _check(self)

    @property
    def place(self) -> str:
        """The device that the trial runs on."""
        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def least(self) -> float:
        """The least gain that would be worth a conversion."""
        return METRICS[self.metric] if self.worth is None else self.worth

    def of_runs(self) -> dict[str, Any]:
        """What the runs' results depend on: not how they are judged, how many there are, or how many run at once."""
        judged = {"seeds", "metric", "part", "worth", "workers", "device", "kinds", "all_kinds", "rates"}
        return {name: value for name, value in asdict(self).items() if name not in judged}


def _check(plan: Plan) -> None:
    if len(set(plan.seeds)) < 2:
        raise TrialError(
            f"a trial needs at least 2 different seeds for an interval, got {list(plan.seeds)}; 5 are usual"
        )
    for name in ("steps", "held_out", "workers"):
        if getattr(plan, name) < 1:
            raise TrialError(f"{name} must be at least 1, got {getattr(plan, name)}")
    for name, values in (("rates", plan.rates), ("level_rate", (plan.level_rate,))):
        if not values or not all(0 < value < math.inf for value in values):
            raise TrialError(f"{name} must be positive, got {list(values)}")
    if plan.worth is not None and not 0 <= plan.worth < math.inf:
        raise TrialError(f"worth must be at least 0, got {plan.worth}")
    _check_device(plan.place)
    _check_choice("metric", [plan.metric], tuple(METRICS))
    _check_choice("part", [plan.part], PARTS)
    _check_choice("inner", [plan.inner], INNER)
    _check_choice("kinds", plan.kinds, tuple(KINDS))
    _check_choice("all_kinds", plan.all_kinds, tuple(KINDS))


def _check_device(name: str) -> None:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
        said = str(error).partition("\n")[0].partition(": ")[0]
        raise TrialError(f"device: {name!r} cannot be used here ({said}); use cpu, or cuda with a GPU") from error


def _check_choice(name: str, given: Sequence[str], allowed: Sequence[str]) -> None:
    unknown = [value for value in given if value not in allowed]
    if unknown:
        raise TrialError(f"{name}: unknown {unknown[0]!r}; known: {', '.join(allowed)}")
