"""The level weights that a module has, also where a wrapper has put itself around them or computes them anew.

Some libraries replace a module by one of their own that holds it (PEFT does for `modules_to_save=["loglinear"]` and for
`target_parameters=["loglinear.weight"]`). What counts is where they hang and what is inside.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from llcompile.weights.level_weights import LevelWeights

# What every name of level weights begins with; `passes` give the names.
PREFIX = "loglinear"


def held(owner: nn.Module) -> Iterator[tuple[str, LevelWeights]]:
    """The level weights of a module itself (not of modules below it), each with its name."""
    for name, child in owner._modules.items():
        weights = inside(name, child)
        if weights is not None:
            yield name, weights


def inside(name: str, child: Any) -> LevelWeights | None:
    """The level weights that a module holds as `child` under `name`, or None. Of several copies the first."""
    if not name.startswith(PREFIX) or not isinstance(child, nn.Module):
        return None
    return next((m for m in child.modules() if isinstance(m, LevelWeights)), None)


def copies(name: str, child: Any) -> list[LevelWeights]:
    """All level weights that stand under a name: a wrapper may keep the original beside what it trains."""
    return [] if inside(name, child) is None else [m for m in child.modules() if isinstance(m, LevelWeights)]


def path(owner: nn.Module, name: str) -> tuple[str, ...]:
    """The names that lead from `owner.<name>` to the level weights that count.

    Raises:
        LookupError: a wrapper decides only when it is called, or computes tensors that nothing holds.
    """
    child = getattr(owner, name)
    found = [tuple(n.split(".")) for n, m in child.named_modules() if isinstance(m, LevelWeights)]
    if isinstance(child, LevelWeights):
        return ()
    active = set(getattr(child, "active_adapters", None) or ())
    chosen = [names for names in found if active & set(names)] or found
    if len(chosen) != 1 or _adapts(child) or any(hasattr(m, "parametrizations") for m in child.modules()):
        raise LookupError(f"{type(child).__name__} around {name!r} makes its tensors when it is called")
    return chosen[0]


def active(owner: nn.Module, name: str) -> nn.Module:
    """What counts of the level weights under a name: of several copies that a wrapper keeps, the one in use.

    That is the wrapper itself where it computes them from all that it has.
    """
    module: Any = owner._modules[name]
    try:
        for step in path(owner, name):
            module = getattr(module, step)
    except LookupError:
        pass
    return module  # type: ignore[no-any-return]


def values(child: Any) -> list[Tensor]:
    """The tensors of level weights as a call of them would use, for `LevelWeights.tensors()`; for traced code."""
    if isinstance(child, LevelWeights):
        return [tensor for _, tensor in child.tensors()]
    if not _adapts(child):
        return child(None)  # type: ignore[no-any-return]
    # PEFT's adapter of one parameter registers a parametrisation for the length of a call, which Dynamo cannot trace.
    rows = [name for name, _ in next(m for m in child.modules() if isinstance(m, LevelWeights)).tensors()]
    found = dict(zip(rows, values(child.base_layer), strict=True))
    if not child.disable_adapters and not child.merged:
        for adapter in child.active_adapters:
            if adapter in child.lora_A:
                found[child.parameter_name] = found[child.parameter_name] + child.get_delta_weight(adapter)
    return list(found.values())


def _adapts(child: Any) -> bool:
    return hasattr(child, "get_delta_weight") and hasattr(child, "parameter_name")
