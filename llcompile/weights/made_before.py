"""What was made from a model before it was converted goes on: states of optimizers, and averages of the model.

Both count parameters in order, and level weights have come in between. Torch has no hook for either; this file is the
only one that wraps them.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from llcompile.weights.held import copies, held
from llcompile.weights.level_weights import LevelWeights
from llcompile.weights.optimizer_watch import owners

log = logging.getLogger("llcompile")


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
        return original(self, with_room(self, state_dict))

    torch.optim.Optimizer.load_state_dict = load_state_dict  # type: ignore[method-assign]


def with_room(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A state with a place for each level weight of the optimizer, or the same one if it has them (or does not fit).

    Level weights have no state then, as parameters have none that were not stepped yet.
    """
    saved, groups = state.get("param_groups"), optimizer.param_groups
    levels = _level_parameters()
    if not isinstance(saved, list) or not levels:
        return state
    used = [number for group in saved for number in group["params"]]
    fresh = iter(range(1 + max((n for n in used if isinstance(n, int)), default=-1), 2**62))
    made: list[dict[str, Any]] = []
    for number, group in enumerate(groups):
        own = [id(p) in levels for p in group["params"]]
        if number >= len(saved) and not all(own):
            return state
        old = saved[number] if number < len(saved) else {**group, "params": []}
        if len(old["params"]) == len(own):
            made.append(old)
        elif len(old["params"]) == own.count(False):
            rest = iter(old["params"])
            made.append({**old, "params": [next(fresh) if is_level else next(rest) for is_level in own]})
        else:
            return state
    if [g["params"] for g in made] == [g["params"] for g in saved]:
        return state
    log.info("the optimizer's state was saved before the model was converted: level weights start without one")
    return {**state, "param_groups": made}


def _level_parameters() -> set[int]:
    weights = [w for owner in owners() for name, _ in held(owner) for w in copies(name, owner._modules[name])]
    return {id(p) for one in weights for p in one.parameters()}


def _wrap_averaging(attach: Attach) -> None:
    original = AveragedModel.update_parameters

    @functools.wraps(original)
    def update_parameters(self: AveragedModel, model: nn.Module) -> None:
        _join(self.module, model, attach)
        original(self, model)

    AveragedModel.update_parameters = update_parameters  # type: ignore[method-assign]


def _join(average: nn.Module, model: nn.Module, attach: Attach) -> None:
    """Gives an average the level weights that its model has and it lacks, at their values of now."""
    others = dict(average.named_modules())
    for path, owner in model.named_modules():
        other = others.get(path)
        for name, weights in held(owner):
            if other is not None and type(owner._modules[name]) is LevelWeights and name not in other._modules:
                device = next((p.device for p in other.parameters()), None)
                attach(other, name, copy.deepcopy(weights).requires_grad_(False).to(device))
