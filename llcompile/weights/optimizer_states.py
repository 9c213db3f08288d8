"""States of optimizers, which count parameters in order: level weights have come in between since they were saved."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from llcompile.errors import CheckpointError
from llcompile.weights.level_weights import LevelWeights, alive

log = logging.getLogger("llcompile")

Group = dict[str, Any]

# What torch's optimizers keep of each parameter in the shape of that parameter.
_MOMENTS = (
    "exp_avg",
    "exp_avg_sq",
    "max_exp_avg_sq",
    "exp_inf",
    "momentum_buffer",
    "square_avg",
    "grad_avg",
    "acc_delta",
    "sum",
    "prev",
    "step_size",
    "ax",
)


def fitted(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A state with a place for each level weight of the optimizer; the same one if it has them.

    Level weights that it does not know have no state then, as parameters have none that were not stepped yet. Names
    of parameters count where the optimizer and the state have the same ones, otherwise their order.

    Raises:
        CheckpointError: the state is of other parameters, or of the same ones in another order; the optimizer is
            unchanged.
    """
    levels = {id(p): weights for weights in alive() for p in weights.parameters()}
    flags = [[id(p) in levels for p in group["params"]] for group in optimizer.param_groups]
    saved = state.get("param_groups")
    if not isinstance(saved, list) or not any(map(any, flags)):
        return state
    made = _groups(optimizer, saved, flags)
    if len(made) != len(saved) or any(new is not old for new, old in zip(made, saved, strict=True)):
        log.info("the optimizer's state was saved before the model was converted: level weights start without one")
        state = {**state, "param_groups": made}
    _expect_shapes(optimizer, state, levels)
    return state


def _groups(optimizer: torch.optim.Optimizer, saved: Sequence[Group], flags: list[list[bool]]) -> list[Group]:
    """The saved groups, each with as many parameters as the optimizer's."""
    used = [number for group in saved for number in group["params"]]
    fresh = iter(range(1 + max((n for n in used if isinstance(n, int)), default=-1), 2**62))
    known = iter(saved)
    whole = len(saved) == len(flags)
    made: list[Group] = []
    for group, own in zip(optimizer.param_groups, flags, strict=True):
        old = {**group, "params": [], "param_names": []} if all(own) and not whole else next(known, None)
        numbers = None if old is None else _numbers(group, old, own, fresh)
        if old is None or numbers is None:
            raise CheckpointError(_counts(optimizer, saved, flags))
        if all(own) and not old.keys() >= group.keys():
            old = {**group, **old}  # a state by names (torch.distributed.checkpoint) knows no settings of a new group
        made.append(_renamed({**old, "params": numbers}, group) if numbers != old["params"] else old)
    if next(known, None) is not None:
        raise CheckpointError(_counts(optimizer, saved, flags))
    return made


def _numbers(group: Group, old: Group, own: list[bool], fresh: Iterator[int]) -> list[Any] | None:
    """The number in the state of each parameter of a group, or None if there is no telling."""
    names = group.get("param_names")
    if names and len(old.get("param_names") or ()) == len(old["params"]) > 0:
        known = dict(zip(old["param_names"], old["params"], strict=True))
        rest = [name for name, is_level in zip(names, own, strict=True) if not is_level]
        if known.keys() <= set(names) and known.keys() >= set(rest):
            return [known[name] if name in known else next(fresh) for name in names]
    if len(old["params"]) == len(own):
        return list(old["params"])
    if len(old["params"]) == own.count(False):
        others = iter(old["params"])
        return [next(fresh) if is_level else next(others) for is_level in own]
    return None


def _renamed(made: Group, group: Group) -> Group:
    """Torch takes the names of a state over, so they must be as many as the parameters."""
    made.pop("param_names", None)
    return {**made, "param_names": list(group["param_names"])} if "param_names" in group else made


def _counts(optimizer: torch.optim.Optimizer, saved: Sequence[Group], flags: list[list[bool]]) -> str:
    found = [len(group["params"]) for group in saved]
    own = " and ".join(f"{len(flag) - sum(flag)} + {sum(flag)} of level weights" for flag in flags)
    return (
        f"the state for {type(optimizer).__name__} has groups of {found} parameters, the optimizer's have {own}, and "
        f"they cannot be matched. {_WHAT_TO_DO}"
    )


def _expect_shapes(optimizer: torch.optim.Optimizer, state: dict[str, Any], levels: dict[int, LevelWeights]) -> None:
    """Torch loads moments of any shape; a later step fails on them, or goes on with those of another parameter."""
    if not type(optimizer).__module__.startswith("torch.optim."):  # others may keep factors, or blocks of 8 bits
        return
    for number, group in enumerate(optimizer.param_groups):
        for position, (p, key) in enumerate(zip(group["params"], state["param_groups"][number]["params"], strict=True)):
            for name in _MOMENTS:
                value = state["state"].get(key, {}).get(name)
                if isinstance(value, Tensor) and value.dim() and value.shape != p.shape:
                    what = f"level weights, {levels[id(p)].extra_repr()}" if id(p) in levels else "not level weights"
                    raise CheckpointError(
                        f"the state for {type(optimizer).__name__} has {name} {list(value.shape)} for parameter "
                        f"{position} of group {number}, which is {list(p.shape)} ({what}). It is of level weights of "
                        f"another kind or size, or parameters stood in another order. {_WHAT_TO_DO}"
                    )


_WHAT_TO_DO = (
    "Build the optimizer as it was when the state was saved (of the model converted with the same options, or before "
    "it was converted), or save and load by names: get_state_dict and set_state_dict of "
    "torch.distributed.checkpoint.state_dict."
)
