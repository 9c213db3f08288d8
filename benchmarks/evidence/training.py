"""Going on from one checkpoint in several ways: arms, the model of each, and one training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import llcompile
from benchmarks.evidence.worker import Job
from llcompile.errors import BenchError

State = dict[str, Tensor]
_WARMUP = 50  # steps
ROUTING = 32  # width of a routing query


@dataclass(frozen=True)
class Arm:
    """One way of going on. `levels` is the kind of level weights (None: not converted)."""

    name: str
    levels: str | None
    all_weights: bool


STAYING = Arm("staying", None, all_weights=True)
ARMS = (
    STAYING,
    Arm("linear alone", "linear", all_weights=False),
    Arm("routed alone", "routed", all_weights=False),
    Arm("all, linear", "linear", all_weights=True),
    Arm("all, routed", "routed", all_weights=True),
)


@dataclass(frozen=True)
class Rates:
    """Peak learning rates of level weights and of all others."""

    levels: float
    others: float


class Student:
    """A model with or without level weights, run by the backend in both cases.

    Args:
        module: a transformers model or another; changed in place.
        example: the arguments of its forward that it is converted on.
        levels: kind of level weights, or None for the linear operator of the same backend.
        longest: tokens; there is a level weight for each level of such a sequence.
        inner: the backend's inner compiler.
        dynamic: whether one graph serves all lengths.
        keywords: further inputs of its forward.
    """

    def __init__(
        self,
        module: nn.Module,
        example: tuple[Any, ...],
        levels: str | None,
        longest: int,
        inner: str,
        dynamic: bool = False,
        **keywords: Any,
    ) -> None:
        self.module, self.keywords = module, keywords
        options: dict[str, Any] = {"level_weights": levels or "none"}
        if levels is not None:
            options["levels"] = (longest - 1).bit_length() + 1
            if levels == "routed":
                options["routing_features"] = ROUTING
            # The outputs at conversion are compared by the experiments themselves, on trained weights.
            report = llcompile.convert(module, *example, options=options, verify=False, **keywords)
            if not report.converted or report.declined:
                raise BenchError(f"not every mixer of {type(module).__name__} converts:\n{report}")
        self._run = torch.compile(module, backend="loglinear", dynamic=dynamic, options={**options, "inner": inner})
        self._at_start = {name: tensor for name, tensor in self.state().items() if is_level_weight(name)}

    def __call__(self, *arguments: Any) -> Any:
        """The model's output."""
        return self._run(*arguments, **self.keywords)

    def state(self) -> State:
        """A copy of the parameters and buffers."""
        return {name: tensor.detach().clone() for name, tensor in self.module.state_dict().items()}

    def load(self, checkpoint: State) -> None:
        """Take over a linear checkpoint; level weights go back to where each is 1."""
        self.module.load_state_dict({**self._at_start, **checkpoint})

    def reset_levels(self) -> None:
        """Put level weights back to where each is 1, and leave all others as they are."""
        self.module.load_state_dict(self._at_start, strict=False)

    def groups(self, arm: Arm, rates: Rates, others: Iterable[nn.Parameter] = ()) -> list[dict[str, Any]]:
        """The optimizer's groups; `others` are parameters outside the module, trained where all weights are."""
        named = list(self.module.named_parameters())
        if any("loglinear" in name and name not in self._at_start for name, _ in named):
            raise BenchError("the first compiled call attached level weights that the conversion had not attached")
        levels = [p for name, p in named if is_level_weight(name)]
        rest = [*(p for name, p in named if not is_level_weight(name)), *others]
        # Weight decay would pull level weights back to 1, that is, to the linear model.
        groups = [{"params": levels, "lr": rates.levels, "weight_decay": 0.0}] if levels else []
        return groups + ([{"params": rest, "lr": rates.others, "weight_decay": 0.1}] if arm.all_weights else [])


def is_level_weight(name: str) -> bool:
    """Whether a parameter of this name came with the conversion."""
    return "loglinear" in name.split(".")


def fit(job: Job, loss_of: Callable[[int], Tensor], groups: list[dict[str, Any]], steps: int) -> float:
    """Train with AdamW on `loss_of(step)`, warm-up and half a cosine; returns milliseconds per step.

    Raises BenchError where the loss ends as NaN.
    """
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=job.device != "cpu")
    peaks = [group["lr"] for group in groups]
    parameters = [p for group in groups for p in group["params"]]
    started, loss = time.perf_counter(), torch.zeros(())
    for step in range(steps):
        job.tick()
        share = min(1.0, (step + 1) / max(1, min(_WARMUP, steps // 4))) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * share
        loss = loss_of(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    if not math.isfinite(float(loss.detach())):  # waits for the device as well
        raise BenchError(f"a training of {steps} steps ended with the loss {float(loss)}: lower the learning rates")
    return 1e3 * (time.perf_counter() - started) / max(1, steps)
