"""Training on recall: one loop, and the three ways in which the demo goes on from a trained model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demo.recall import IGNORED, Accuracy, Exam

Curve = list[tuple[int, float]]  # (steps so far, accuracy)
Tick = Callable[[], None]
State = dict[str, Tensor]


@dataclass(frozen=True)
class Plan:
    """How long and how fast to train. `rate` and `rate_after` are peak learning rates before and after conversion."""

    steps: int = 2000
    more: int = 800
    batch: int = 16
    rate: float = 1e-2
    rate_after: float = 5e-3
    rate_levels: float = 3e-2
    warmup: int = 100
    weight_decay: float = 0.1
    measures: int = 8


@dataclass(frozen=True)
class Arm:
    """One way of going on: which parameters the optimiser gets."""

    name: str
    converted: bool
    trained: Callable[[str], bool]

    def groups(self, model: nn.Module, plan: Plan) -> list[dict[str, Any]]:
        """The optimiser's parameter groups."""
        named = [(name, p) for name, p in model.named_parameters() if self.trained(name)]
        levels = [p for name, p in named if is_level_weight(name)]
        others = [p for name, p in named if not is_level_weight(name)]
        groups = [
            # Weight decay would pull them back to 1, that is, to the linear model.
            {"params": levels, "lr": plan.rate_levels, "weight_decay": 0.0},
            {"params": others, "lr": plan.rate_after, "weight_decay": plan.weight_decay},
        ]
        return [group for group in groups if group["params"]]


def is_level_weight(name: str) -> bool:
    """Whether a parameter of this name came with the conversion."""
    return "loglinear" in name.split(".")


# Each starts from the same checkpoint and sees the same batches in the same order.
ARMS = (
    Arm("staying linear", converted=False, trained=lambda name: True),
    Arm("level weights alone", converted=True, trained=is_level_weight),
    Arm("all weights", converted=True, trained=lambda name: True),
)


class Runner:
    """A model, and what runs it: the model itself, or what torch.compile made of it."""

    def __init__(self, model: nn.Module, run: Callable[..., Any] | None = None) -> None:
        self.model = model
        self.run = model if run is None else run  # not `or`: that asks a compiled model for its length
        self._levels_at_start = {name: tensor for name, tensor in self.state().items() if is_level_weight(name)}

    def logits(self, tokens: Tensor) -> Tensor:
        """The model's logits [B, T, vocabulary]."""
        output: Tensor = self.run(tokens, use_cache=False).logits
        return output

    def accuracy(self, exam: Exam) -> Accuracy:
        """The accuracy on held-out sequences."""
        # Not under no_grad: that would be another graph, and compiling it takes longer than all it could save.
        return exam.accuracy([self.logits(batch.tokens).detach() for batch in exam.batches])

    def load(self, checkpoint: State) -> None:
        """Takes over a checkpoint; level weights, which a linear model's has not, go back to where they began."""
        self.model.load_state_dict({**self._levels_at_start, **checkpoint})

    def reset_levels(self) -> None:
        """Puts level weights back to where they began, where each is 1."""
        self.model.load_state_dict(self._levels_at_start, strict=False)

    def state(self) -> State:
        """A copy of the parameters and buffers."""
        return {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}


def learn(
    runner: Runner,
    exam: Exam,
    plan: Plan,
    groups: list[dict[str, Any]],
    steps: int,
    seed: int,
    tick: Tick = lambda: None,
) -> Curve:
    """Trains for `steps` steps on fresh sequences.

    Returns:
        The held-out accuracy along the way, before the first step and after the last one included.
    """
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    parameters = [p for group in groups for p in group["params"]]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps, plan.warmup))
    curve = [(0, runner.accuracy(exam).overall)]
    every = max(1, math.ceil(steps / plan.measures))
    for step, batch in enumerate(_first(exam.task.stream(plan.batch, seed), steps), 1):
        logits = runner.logits(batch.tokens)
        loss = F.cross_entropy(logits.flatten(0, 1), batch.answers.flatten(), ignore_index=IGNORED)
        runner.model.zero_grad(
            set_to_none=True
        )  # also of those that are not trained: they stay in the graph, so that all arms share it
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        tick()
        if step % every == 0 or step == steps:
            curve.append((step, runner.accuracy(exam).overall))
    return curve


def _rate(step: int, steps: int, warmup: int) -> float:
    """Warm-up, then half a cosine down to 0, as a share of the peak."""
    return min(1.0, (step + 1) / max(1, min(warmup, steps // 4))) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _first(stream: Iterator[Any], count: int) -> Iterator[Any]:
    for _, item in zip(range(count), stream, strict=False):
        yield item
