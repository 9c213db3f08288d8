"""Whether level weights act: other values of them give another output, and they have gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from llcompile.checks.compare import Result, difference, leaves
from llcompile.checks.runs import MODEL_BUDGETS, Mixer, Runs, hooked, kept_values
from llcompile.patterns import reasons
from llcompile.patterns.reasons import GivenReason
from llcompile.torch_internals.dtensors import like
from llcompile.weights.level_weights import LevelWeights

_NOISE = 0.3


def acting(runs: Runs, mixers: list[Mixer]) -> tuple[list[Mixer], dict[Mixer, GivenReason], dict[Mixer, str]]:
    """The mixers whose level weights act; those that do not, with the reason; and notes on the rest."""
    weighted = [m for m in mixers if m.weights is not None]
    if not weighted or _all_act(runs, weighted):
        return weighted, {}, {}
    with _noise([m.weights for m in weighted], runs.model):
        base = runs.rewritten(mixers)
    silent = [m for m in weighted if not base.has_levels(m.weights)]
    moving = {m for m in silent if _moves(runs, m, mixers, base)}
    idle: dict[Mixer, GivenReason] = {}
    notes: dict[Mixer, str] = {}
    for mixer in silent:
        if mixer in moving and not base.graded:
            continue
        if mixer not in moving and _is_zero(runs, mixer):
            notes[mixer] = "its output is zero on the example inputs, so that they do not show its level weights acting"
            continue
        idle[mixer] = reasons.WEIGHTS_WITHOUT_GRADIENT() if mixer in moving else reasons.WEIGHTS_IDLE()
    return [m for m in weighted if m not in idle and m not in notes], idle, notes


def _all_act(runs: Runs, weighted: list[Mixer]) -> bool:
    """Whether the comparison itself has shown gradients of all level weights, and noise on them moves the output.

    That is the common case, and costs one forward pass.
    """
    if not all(runs.last.has_levels(m.weights) for m in weighted):
        return False
    with _noise([m.weights for m in weighted], None):
        moved = runs.rewritten(runs.kept, gradients=False)
    return difference(moved, runs.last) > 4 * torch.finfo(runs.dtype).eps


def _moves(runs: Runs, mixer: Mixer, mixers: list[Mixer], base: Result) -> bool:
    """Whether other values of these level weights alone give another output."""
    others = [m.weights for m in mixers if m.weights is not None]
    with _noise(others, runs.model), _noise([mixer.weights], None, seed=1):
        return difference(runs.rewritten(mixers, gradients=False), base) > 4 * torch.finfo(runs.dtype).eps


def _is_zero(runs: Runs, mixer: Mixer) -> bool:
    """Whether the mixer's module gives nothing but zeros on the example inputs."""
    seen: list[bool] = []

    def note(owner: nn.Module, inputs: Any, output: Any) -> None:
        seen.extend(not out.any() for out in leaves(output))

    with hooked([mixer.owner], note):
        runs.plain()
    return bool(seen) and all(seen)


@contextmanager
def _noise(held: Iterable[LevelWeights | None], model: nn.Module | None, seed: int = 0) -> Iterator[None]:
    """Noise on level weights and, so that nothing hides them, on parameters of the model that are zero as a whole."""
    learned = [p for weights in held if weights is not None for p in weights.parameters()]
    own = [] if model is None else [p for p in model.parameters() if p.dtype in MODEL_BUDGETS and p.numel()]
    zero = [p for p in own if not p.any()]
    ours = {id(p) for p in learned}
    tensors = learned + [p for p in zero if id(p) not in ours]
    with kept_values(tensors):
        for i, tensor in enumerate(tensors):
            drawn = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed * 7919 + i))
            with torch.no_grad():
                tensor.add_(like(_NOISE * drawn.to(tensor.device, tensor.dtype), tensor))
        yield
