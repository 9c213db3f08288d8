"""Wrappers of torch.distributed, which take a module's parameters as they are when they are made.

Level weights that are attached afterwards belong to none of them: each process would train its own.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from llcompile.errors import DistributedError


def expect_none(owners: Iterable[nn.Module]) -> None:
    """Raise where new level weights come too late for a wrapper around their owner.

    Raises:
        DistributedError: DDP or FSDP wraps one of the modules.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    new = list(owners)
    sharded = [owner for owner in new if getattr(owner, "_is_fsdp_managed_module", False)]
    late = sharded or _in_ddp(new)
    if late:
        wrapper, call = ("FSDP", "fully_shard(model)") if sharded else ("DDP", "DistributedDataParallel(model)")
        names = ", ".join(sorted({type(owner).__name__ for owner in late}))
        raise DistributedError(
            f"{wrapper} was applied before level weights were attached to {len(late)} mixers ({names}), so their "
            "gradients would not be reduced and each process would train its own; the model is unchanged. Attach them "
            f"first: llcompile.convert(model, *example_inputs), then {call}, then the optimizer."
        )


def expect_traceable(model: Any) -> None:
    """Raise where Dynamo does not trace a module because of its wrapper.

    Raises:
        DistributedError: FSDP1 wraps it with `use_orig_params=False`, its default.
    """
    owner = getattr(model, "__self__", model)
    modules = owner.modules() if isinstance(owner, nn.Module) else ()
    flat = next((m for m in modules if not getattr(m, "_fsdp_use_orig_params", True)), None)
    if flat is not None:
        raise DistributedError(
            f"FullyShardedDataParallel holds {type(flat).__name__} with use_orig_params=False, its default, and Dynamo "
            "does not trace such modules: they would run uncompiled, as the linear model. Use fully_shard (FSDP2), or "
            "FullyShardedDataParallel(model, use_orig_params=True); convert the model before either."
        )


def _in_ddp(owners: list[nn.Module]) -> list[nn.Module]:
    """Those that are inside of a DistributedDataParallel, which leaves no mark on them."""
    found = _held_by_ddp(owners)
    if found:
        gc.collect()  # one that is no longer in use may still be there
        found = _held_by_ddp(owners)
    return found


def _held_by_ddp(owners: list[nn.Module]) -> list[nn.Module]:
    # By type(o): isinstance asks a dead weakref.proxy for its __class__, which raises.
    wrappers = [o for o in gc.get_objects() if issubclass(type(o), nn.parallel.DistributedDataParallel)]
    inside = {id(module) for wrapper in wrappers for module in wrapper.modules()}
    return [owner for owner in owners if id(owner) in inside]
