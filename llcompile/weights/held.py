"""The level weights that a module has, also where a wrapper has put itself around them or computes them anew.

Some libraries replace a module by one of their own that holds it (PEFT does for `modules_to_save=["loglinear"]` and for
`target_parameters=["loglinear.weight"]`). What counts is where they hang and what is inside.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from torch import Tensor, nn

from llcompile.weights.level_weights import LevelWeights

# What every name of level weights begins with; `passes` give the names.
PREFIX = "loglinear"
# Where PEFT's wrapper of modules to save has the module that it was put around.
_ORIGINAL = "original_module"


def held(owner: nn.Module) -> Iterator[tuple[str, LevelWeights]]:
    """The level weights of a module itself (not of modules below it), each with its name."""
    for name, child in owner._modules.items():
        weights = inside(name, child)
        if weights is not None:
            yield name, weights


def inside(name: str, child: Any) -> LevelWeights | None:
    """The level weights that a module holds as `child` under `name`, or None.

    Of several copies the one in use; the first where a wrapper computes them from all that it has.
    """
    if isinstance(child, LevelWeights) and name.startswith(PREFIX):
        return child
    if not holds(name, child):
        return None
    try:
        return cast("LevelWeights", child.get_submodule(".".join(_way(child, name))))
    except LookupError:
        return next(m for m in child.modules() if isinstance(m, LevelWeights))


def holds(name: str, child: Any) -> bool:
    """Whether there are level weights in what a module holds as `child` under `name`; for traced code, too."""
    if not name.startswith(PREFIX) or not isinstance(child, nn.Module):
        return False
    return any(isinstance(m, LevelWeights) for m in child.modules())


def copies(name: str, child: Any) -> list[LevelWeights]:
    """All level weights that stand under a name: a wrapper may keep the original beside what it trains."""
    return [m for m in child.modules() if isinstance(m, LevelWeights)] if holds(name, child) else []


def path(owner: nn.Module, name: str) -> tuple[str, ...]:
    """The names that lead from `owner.<name>` to the level weights that count.

    Raises:
        LookupError: a wrapper decides only when it is called, or computes tensors that nothing holds.
    """
    return _way(getattr(owner, name), name)


def _way(child: nn.Module, name: str) -> tuple[str, ...]:
    module, steps = child, list[str]()
    while not isinstance(module, LevelWeights):
        inward = _inward(module, name)
        steps += inward
        module = module.get_submodule(".".join(inward))
    if steps and hasattr(module, "parametrizations"):
        raise _called(module, name)
    return tuple(steps)


def _inward(wrapper: Any, name: str) -> tuple[str, ...]:
    """The names that lead from a wrapper to what it calls now."""
    found = [tuple(n.split(".")) for n, m in wrapper.named_modules() if isinstance(m, LevelWeights)]
    if _adapts(wrapper) or hasattr(wrapper, "parametrizations"):
        raise _called(wrapper, name)
    if not hasattr(wrapper, "active_adapters"):
        ways = list({names[:1] for names in found})
    else:
        off = getattr(wrapper, "disable_adapters", False)
        used = set(() if off else wrapper.active_adapters or ())
        # With no adapter that has a copy of its own in use, PEFT calls the module that it was put around.
        ways = [names for names in found if used & set(names)] or [n for n in found if n[0] == _ORIGINAL] or found
    if len(ways) != 1:
        raise _called(wrapper, name)
    return ways[0]


def _called(wrapper: nn.Module, name: str) -> LookupError:
    return LookupError(f"{type(wrapper).__name__} around {name!r} makes its tensors when it is called")


def active(owner: nn.Module, name: str) -> nn.Module:
    """What counts of the level weights under a name: of several copies that a wrapper keeps, the one in use.

    That is the wrapper itself where it computes them from all that it has.
    """
    child: Any = owner._modules[name]
    try:
        return child.get_submodule(".".join(_way(child, name)))  # type: ignore[no-any-return]
    except LookupError:
        return child  # type: ignore[no-any-return]


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
