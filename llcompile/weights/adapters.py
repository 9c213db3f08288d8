"""Adapters: a converted model under PEFT, which freezes and leaves out of its files what it does not know.

Converted before the adapters were added, level weights are frozen with the rest, and a training without them is told
so. Converted after, they are enlisted with PEFT as a module to save: trained, and in the adapter's file.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from llcompile.errors import LevelWeightsFrozenWarning
from llcompile.weights.held import copies, held
from llcompile.weights.level_weights import LevelWeights

_warned: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def enlist(model: nn.Module, owners: Iterable[tuple[nn.Module, str]]) -> None:
    """Hands new level weights (their owner, their name) to PEFT, if the model has adapters of it."""
    adapted: Any = next((module for module in model.modules() if _active(module)), None)
    if adapted is None:
        return
    from peft.utils import ModulesToSaveWrapper

    for owner, name in owners:
        if isinstance(getattr(owner, name), LevelWeights):
            first, *others = _active(adapted)
            wrapper: Any = ModulesToSaveWrapper(getattr(owner, name), first)
            for adapter in others:
                wrapper.update(adapter)
            wrapper.set_adapter(first)
            setattr(owner, name, wrapper)
        for adapter in _active(adapted):
            config = adapted.peft_config[adapter]
            config.modules_to_save = sorted({*(config.modules_to_save or ()), name})


def warn_if_frozen(owners: Iterable[tuple[nn.Module, str]], trained: Iterable[Any]) -> None:
    """Warns, once for each owner, when a training runs in which level weights stay as they are and that is not meant.

    That is, when they were frozen together with other parameters of their owner, and something else is trained.
    """
    if not torch.is_grad_enabled() or not any(isinstance(p, nn.Parameter) and p.requires_grad for p in trained):
        return
    frozen = [owner for owner, name in owners if owner not in _warned and _is_frozen(owner, name)]
    _warned.update(frozen)
    if frozen:
        kinds = ", ".join(sorted({type(owner).__name__ for owner in frozen}))
        warnings.warn(
            f"the level weights of {len(set(frozen))} converted mixers ({kinds}) were frozen together with other "
            "parameters of their mixers, so they will not be trained. Exclude them from the freezing (PEFT: "
            "modules_to_save=['loglinear']), convert the model after adapters are added, or call requires_grad_(True) "
            "on them.",
            LevelWeightsFrozenWarning,
            stacklevel=2,
        )


def _is_frozen(owner: nn.Module, name: str) -> bool:
    own = [p for weights in copies(name, owner._modules[name]) for p in weights.parameters()]
    levels = {id(p) for other, _ in held(owner) for p in owner._modules[other].parameters()}  # type: ignore[union-attr]
    others = [p for p in owner.parameters() if id(p) not in levels]
    adapted = any(p.requires_grad for p in owner._modules[name].parameters())  # type: ignore[union-attr]
    return bool(own) and not adapted and not any(p.requires_grad for p in own) and _some_frozen(others)


def _some_frozen(parameters: list[nn.Parameter]) -> bool:
    return any(not p.requires_grad for p in parameters)


def _active(module: Any) -> list[str]:
    """The names of PEFT's adapters that a model runs with; [] for any other module."""
    if not isinstance(getattr(module, "peft_config", None), dict) or not hasattr(module, "active_adapters"):
        return []
    active = module.active_adapters
    active = active() if callable(active) else active
    return [name for name in active if name in module.peft_config]
