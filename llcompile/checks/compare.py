"""Comparing two runs of a model: all tensors that it returns, and the gradients of its parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch.utils import _pytree

from llcompile.kernels.state import linear_state
from llcompile.patterns.agreement import apart
from llcompile.patterns.known.arguments import is_level_state
from llcompile.torch_internals.dtensors import like as placed_like
from llcompile.torch_internals.dtensors import whole
from llcompile.weights.level_weights import LevelWeights

_FLOOR = 1e-3  # of the largest value of all: what is smaller is compared with that


@dataclass
class Result:
    """One run.

    Args:
        outputs: all floating-point tensors that the model returned.
        gradients: those of the model's own parameters, by name.
        levels: id of a parameter of level weights -> whether it has a gradient.
        graded: whether anything that was returned has one.
    """

    outputs: list[torch.Tensor]
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    levels: dict[int, bool] = field(default_factory=dict)
    graded: bool = False

    def take_gradients(
        self,
        outputs: list[torch.Tensor],
        own: Mapping[str, torch.Tensor],
        held: Sequence[LevelWeights],
        like: Result | None = None,
    ) -> None:
        """Gradients of a fixed function of the outputs, the same for two runs; nothing is added to any `.grad`.

        A level state counts as the linear one that stands in its place in `like`.
        """
        if like is not None and len(like.outputs) == len(outputs):
            outputs = [_as_linear(a, b) for a, b in zip(outputs, like.outputs, strict=True)]
        differentiable = [(i, out) for i, out in enumerate(outputs) if out.requires_grad]
        levels = [p for weights in held for p in weights.parameters() if p.requires_grad]
        inputs = [*own.values(), *levels]
        if not differentiable or not inputs:
            return
        signs = [_direction(i, out) for i, out in differentiable]
        grads = torch.autograd.grad([out for _, out in differentiable], inputs, signs, allow_unused=True)
        zeros = [torch.zeros_like(p) if g is None else g.detach() for p, g in zip(inputs, grads, strict=True)]
        dense = [g.to_dense() if g.layout != torch.strided else whole(g) for g in zeros]
        self.gradients = dict(zip(own, dense, strict=False))
        self.levels = {id(p): bool(g.any()) for p, g in zip(levels, dense[len(own) :], strict=True)}
        self.graded = True

    def has_levels(self, weights: LevelWeights | None) -> bool:
        """Whether every parameter of these level weights that is trained has a gradient."""
        trained = [] if weights is None else [p for p in weights.parameters() if p.requires_grad]
        return bool(trained) and all(self.levels.get(id(p), False) for p in trained)


def leaves(value: Any) -> list[torch.Tensor]:
    """The floating-point tensors that a value holds, in order."""
    found: list[torch.Tensor] = []
    for leaf in _pytree.tree_leaves(value):
        if isinstance(leaf, torch.Tensor):
            if leaf.is_floating_point() or leaf.is_complex():
                found.append(leaf)
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            found.extend(leaves([getattr(leaf, f.name, None) for f in fields(leaf)]))
    return found


def difference(got: Result, want: Result) -> float:
    """The largest difference of any output, relative to that output's largest value."""
    if len(got.outputs) != len(want.outputs):
        return float("inf")
    return _largest([(_as_linear(a, b), b) for a, b in zip(got.outputs, want.outputs, strict=True)])


def gradient_difference(got: Result, want: Result) -> float | None:
    """The same for the gradients of the model's own parameters; None where the model has none."""
    if not want.graded or not want.gradients:
        return None
    got_ = {name: got.gradients.get(name, torch.zeros_like(g)) for name, g in want.gradients.items()}
    return _largest([(got_[name], grad) for name, grad in want.gradients.items()])


def _direction(i: int, out: torch.Tensor) -> torch.Tensor:
    """Fixed weights for the sum that is differentiated: the same in both runs, positive and negative."""
    drawn = torch.randn(out.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float32)
    return placed_like(drawn.to(out.device, out.dtype), out)


def _as_linear(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """A level state as the linear state that the model itself returns in its place."""
    if got.shape == want.shape or not is_level_state(got) or got.dim() != want.dim() + 1:
        return got
    linear = linear_state(got)
    fits = [x for x in (linear, linear.transpose(-1, -2)) if x.shape == want.shape]
    return min(fits, key=lambda x: float((x.detach() - want).abs().max()), default=linear)


def _largest(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """How far (got, want) are apart; what is not finite must be so in both."""
    masks = [want.isfinite() for _, want in pairs]
    for (got, want), finite in zip(pairs, masks, strict=True):
        if got.shape != want.shape or not torch.equal(finite, got.isfinite()):
            return float("inf")
    wants, gots = ([pair[i].detach()[finite] for pair, finite in zip(pairs, masks, strict=True)] for i in (1, 0))
    return apart(wants, gots, slight=_FLOOR)
