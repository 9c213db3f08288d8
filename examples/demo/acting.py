"""Checks that a conversion acts: the output depends on each mixer's level weights, and they get gradients.

At conversion every level weight is 1, so a conversion that does nothing at all computes the right numbers, too. Nobody
should believe a table of accuracies without this check.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llcompile.errors import DemoError
from llcompile.weights.level_weights import LevelWeights

NOISE = 0.3  # standard deviation of what is added to the parameters of level weights
_LEAST = 1e-4  # the least that it has to move the output, as a part of the output's scale

Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Acting:
    """What was seen of level weights.

    Args:
        moved: by mixer, how far noise on its level weights alone moves the output, max |difference| / max |output|.
        gradients: number of the level weights' tensors; each has a gradient that is not 0.
    """

    moved: dict[str, float]
    gradients: int

    def __str__(self) -> str:
        least, most = min(self.moved.values()), max(self.moved.values())
        how = f"{most:.2f}" if len(self.moved) == 1 else f"{least:.2f} to {most:.2f}, mixer by mixer"
        return (
            f"The level weights act: noise on the level weights of one mixer changes the logits by {how}, "
            f"and all {self.gradients} of their tensors have gradients."
        )


def change(before: Tensor, after: Tensor) -> float:
    """max |difference| / max |value|."""
    return ((after - before).abs().max() / before.abs().max()).item()


def check_acts(model: nn.Module, run: Run, name: str) -> Acting:
    """Moves the level weights of one mixer after the other, and puts them back.

    Args:
        run: gives an output of the compiled model that depends on all of its mixers.
        name: of the model, for the errors.

    Raises:
        DemoError: nothing was converted, some noise does not move the output, or some gradient does not arrive.
    """
    held = {key: module for key, module in model.named_modules() if isinstance(module, LevelWeights)}
    if not held:
        raise DemoError(f"{name} has no level weights: no mixer was converted. {_DOCTOR}")
    before = run()
    missing = _without_gradient(before, held)
    moved = {}
    for key, weights in held.items():
        with _noisy(weights):  # not under no_grad, which would be another graph to compile
            moved[key.rpartition(".")[0]] = change(before.detach(), run().detach())
    still = [mixer for mixer, by in moved.items() if not by > _LEAST]
    if still:
        raise DemoError(
            f"{name} was converted but does not act: noise on the level weights of {', '.join(still)} does not "
            f"change its logits, so the compiled model is the linear one. {_DOCTOR}"
        )
    if missing:
        raise DemoError(f"{name} was converted but cannot learn: no gradient reaches {', '.join(missing)}. {_DOCTOR}")
    return Acting(moved, sum(len(list(weights.parameters())) for weights in held.values()))


def _without_gradient(output: Tensor, held: dict[str, LevelWeights]) -> list[str]:
    parameters = {f"{key}.{name}": p for key, weights in held.items() for name, p in weights.named_parameters()}
    if not output.requires_grad:
        return list(parameters)
    gradients = torch.autograd.grad(output.square().mean(), list(parameters.values()), allow_unused=True)
    return [name for name, g in zip(parameters, gradients, strict=True) if g is None or not bool(g.abs().max() > 0)]


@contextmanager
def _noisy(weights: LevelWeights) -> Iterator[None]:
    before = [p.detach().clone() for p in weights.parameters()]
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for p in weights.parameters():
                p.add_(NOISE * torch.randn(p.shape, generator=generator))
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(weights.parameters(), before, strict=True):
                p.copy_(value)


def check_differs(name: str, logits: Tensor, others: dict[str, Tensor]) -> None:
    """Raises DemoError where a converted arm's logits are those of another computation bit for bit.

    Args:
        others: logits on the same tokens, by what they are.
    """
    for what, other in others.items():
        if torch.equal(logits, other):
            raise DemoError(
                f"{name!r} was converted and trained, but its logits equal those of {what} bit for bit: "
                f"its level weights have no effect. {_DOCTOR}"
            )


_DOCTOR = "Run `llcompile doctor` to check the environment; TORCH_LOGS=loglinear shows what the backend did."
