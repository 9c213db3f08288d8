"""Warns once when an optimiser trains a converted model without its level weights."""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from llcompile.errors import OptimizerWarning
from llcompile.weights.held import copies, held

_owners: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_checked: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
_installed = False


def watch(owner: nn.Module) -> None:
    """Remembers a module that level weights were attached to; every optimiser's first step is checked against it."""
    global _installed
    _owners.add(owner)
    _checked.clear()
    if not _installed:
        register_optimizer_step_pre_hook(_check)
        _installed = True


def owners() -> list[nn.Module]:
    """The modules, still alive, that level weights were attached to."""
    return list(_owners)


def _check(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if optimizer in _checked:
        return
    _checked.add(optimizer)
    known = _parameters(optimizer)
    missing = [o for o in _owners if _trains_without_levels(o, known)]
    if missing:
        names = sorted({type(o).__name__ for o in missing})
        warnings.warn(
            f"{type(optimizer).__name__} steps parameters of {len(missing)} converted mixers ({', '.join(names)}) but "
            "holds none of their level weights, so they will not be trained. Call llcompile.convert(model, ...) before "
            "you build the optimizer, or optimizer.add_param_group({'params': [...]}) with the parameters of the "
            "modules named 'loglinear'; freeze them with requires_grad_(False) if that is intended.",
            OptimizerWarning,
            stacklevel=3,
        )


def _trains_without_levels(owner: nn.Module, known: set[int]) -> bool:
    levels = [copy for name, _ in held(owner) for copy in copies(name, owner._modules[name])]
    fresh = {id(p) for c in levels for p in c.parameters() if p.requires_grad}
    others = {id(p) for p in owner.parameters()} - fresh
    if not fresh or fresh & known or not others & known:
        return False
    # Another optimiser may train them (one for matrices and one for the rest, say).
    # By type(o): isinstance asks a dead weakref.proxy for its __class__, which raises.
    optimizers = [o for o in gc.get_objects() if issubclass(type(o), torch.optim.Optimizer)]
    return not any(fresh & _parameters(o) for o in optimizers)


def _parameters(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}
