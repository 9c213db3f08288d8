"""Adapters: a converted model under PEFT, which freezes and leaves out of its files what it does not know.

Converted before the adapters were added, level weights are frozen with the rest, and a training without them is told
so. Converted after, or attached for an adapter's file, they are enlisted with PEFT as a module to save: trained, and in
the adapter's file.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from llcompile.errors import LevelWeightsFrozenWarning
from llcompile.weights.held import copies, held
from llcompile.weights.level_weights import LevelWeights
from llcompile.weights.optimizer_watch import owners as all_owners

_warned: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def enlist(model: nn.Module, owners: Iterable[tuple[nn.Module, str]]) -> None:
    """Hands new level weights (their owner, their name) to PEFT, if the model has adapters of it."""
    configs, active = adapters_of(model)
    for owner, name in owners if active else ():
        if isinstance(getattr(owner, name), LevelWeights):
            keep_for(owner, name, active, active[:1])
        for adapter in active:
            # Kinds of adapters without this field keep what is wrapped in their files, too.
            if hasattr(configs[adapter], "modules_to_save"):
                configs[adapter].modules_to_save = sorted({*(configs[adapter].modules_to_save or ()), name})


def keep_for(owner: nn.Module, name: str, adapters: Sequence[str], active: Sequence[str]) -> None:
    """Wraps level weights as PEFT does for `modules_to_save`: each of the adapters has a copy, `active` is in use."""
    from peft.utils import ModulesToSaveWrapper

    first, *others = adapters
    wrapper: Any = ModulesToSaveWrapper(getattr(owner, name), first)
    for adapter in others:
        wrapper.update(adapter)
    wrapper.set_adapter(list(active))
    setattr(owner, name, wrapper)


def adapters_of(model: nn.Module) -> tuple[dict[str, Any], list[str]]:
    """PEFT's configurations of a model's adapters, by name, and the names of those in use.

    A model that adapters were injected into has no PEFT model around it, and says itself which it has; what is in use
    its layers say.
    """
    modules = list(model.modules())
    configs = next((c for m in modules if isinstance(c := getattr(m, "peft_config", None), dict)), {})
    said = (getattr(m, "active_adapters", None) for m in modules) if configs else ()
    active: Any = next((names for names in said if isinstance(names, list)), [])
    return configs, [name for name in active if name in configs]


def warn_if_frozen(owners: Iterable[tuple[nn.Module, str]], trained: Iterable[Any]) -> None:
    """Warns when a training runs in which level weights stay as they are and that is not meant.

    That is, when they were frozen together with other parameters of their owner, and something else is trained. Said
    once for all modules of a class that are so by now, for each of them may be compiled by itself.
    """
    if not torch.is_grad_enabled() or not any(isinstance(p, nn.Parameter) and p.requires_grad for p in trained):
        return
    frozen = [(owner, name) for owner, name in owners if owner not in _warned and _is_frozen(owner, name)]
    if frozen:
        classes, names = {type(owner) for owner, _ in frozen}, sorted({name for _, name in frozen})
        alike = [owner for owner in all_owners() if type(owner) in classes]
        _warned.update(o for o in alike if any(_is_frozen(o, name) for name, _ in held(o)))
        _warned.update(owner for owner, _ in frozen)
        warnings.warn(
            f"the level weights of {', '.join(sorted(c.__name__ for c in classes))} were frozen together with other "
            "parameters of their mixers, so they will not be trained. Exclude them from the freezing (PEFT: "
            f"modules_to_save={names}), convert the model after adapters are added, or call requires_grad_(True) "
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
