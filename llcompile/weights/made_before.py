"""What was made from a model before it was converted goes on: states of optimizers, and averages of the model.

Both count parameters in order, and level weights have come in between. Torch has no hook for all optimizers or for
averages; this file is the only one that wraps them.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from llcompile.errors import LevelWeightsError
from llcompile.weights.held import held
from llcompile.weights.inner_names import COMPILED, PARALLEL, inner_name
from llcompile.weights.level_weights import LevelWeights
from llcompile.weights.optimizer_states import fitted

Attach = Callable[[nn.Module, str, nn.Module], None]


@functools.cache
def install(attach: Attach) -> None:
    """Wraps `Optimizer.load_state_dict` and `AveragedModel.update_parameters`, once.

    Args:
        attach: registers level weights on a module under a name.
    """
    _wrap_loading()
    _wrap_averaging(attach)


def _wrap_loading() -> None:
    original = torch.optim.Optimizer.load_state_dict

    @functools.wraps(original)
    def load_state_dict(self: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        fit = self.register_load_state_dict_pre_hook(fitted)  # after the user's own hooks
        try:
            return original(self, state_dict)
        finally:
            fit.remove()

    torch.optim.Optimizer.load_state_dict = load_state_dict  # type: ignore[method-assign]


def _wrap_averaging(attach: Attach) -> None:
    original = AveragedModel.update_parameters

    @functools.wraps(original)
    def update_parameters(self: AveragedModel, model: nn.Module) -> None:
        if _join(self.module, model, attach):
            _expect_same(self.module, model)
        original(self, model)

    AveragedModel.update_parameters = update_parameters  # type: ignore[method-assign]


def _join(average: nn.Module, model: nn.Module, attach: Attach) -> bool:
    """Gives an average the level weights that its model has and it lacks, at their values of now.

    Returns whether the model has any.
    """
    others = {_inner(path): module for path, module in average.named_modules()}
    found = [(_inner(path), owner, *own) for path, owner in model.named_modules() for own in held(owner)]
    for path, owner, name, weights in found:
        other = others.get(path)
        if other is not None and type(owner._modules[name]) is LevelWeights and name not in other._modules:
            device = next((p.device for p in other.parameters()), None)
            attach(other, name, copy.deepcopy(weights).requires_grad_(False).to(device))
    return bool(found)


def _inner(path: str) -> str:
    """Of the wrappers around it, an average and its model may have others."""
    return inner_name(path, COMPILED, PARALLEL)


def _expect_same(average: nn.Module, model: nn.Module) -> None:
    """Torch averages parameters in order, as far as they go."""
    ours, theirs = ([list(p.shape) for p in module.parameters()] for module in (average, model))
    if ours != theirs:
        raise LevelWeightsError(
            f"the average of {type(average).__name__} has {len(ours)} parameters, and {type(model).__name__} has "
            f"{len(theirs)} (level weights included) or other shapes: they would be averaged with the wrong ones. Make "
            "the AveragedModel after llcompile.convert, from the model that you update it with."
        )
