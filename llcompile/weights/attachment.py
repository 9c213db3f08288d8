"""Level weights on a model: registering, finding and removing them, and the warning when they are ignored."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from llcompile.errors import LevelWeightsError
from llcompile.kernels.operands import COMPUTE_DTYPES
from llcompile.passes.marks import PARAMETER, mark
from llcompile.torch_internals.backends import backend_below
from llcompile.torch_internals.owner_input import ModuleCall
from llcompile.torch_internals.trace import leave_out
from llcompile.weights import eager_states, made_before, wrapped
from llcompile.weights.held import copies, held, holds, inside, values
from llcompile.weights.ignored import runs_levels, warn_ignored
from llcompile.weights.level_kinds import Readouts, compute_dtype, level_weights_function, whole_rows
from llcompile.weights.level_weights import LevelWeights
from llcompile.weights.optimizer_watch import watch
from llcompile.weights.ours import is_ours
from llcompile.weights.use import forget_use, is_used
from llcompile.weights.withheld import forget_withheld


def make(
    kind: str,
    heads: int,
    levels: int,
    in_features: int | None,
    owner: nn.Module,
    hidden: int | None = None,
    features: int | None = None,
) -> LevelWeights:
    """New level weights on the device of the owner's parameters, in their dtype if it is one to train in."""
    floating = [p for p in owner.parameters() if p.is_floating_point()]
    tensor = next((p for p in floating if p.dtype in COMPUTE_DTYPES), floating[0] if floating else None)
    return LevelWeights(
        kind,
        heads,
        levels,
        None if kind == "static" else in_features,
        hidden=hidden,
        features=features,
        device=None if tensor is None else tensor.device,
        dtype=tensor.dtype if tensor is not None and tensor.dtype in COMPUTE_DTYPES else None,
    ).train(owner.training)


def find(owner: nn.Module, name: str) -> LevelWeights | None:
    """The level weights that `owner` has under `name`, or None.

    Raises:
        LevelWeightsError: the name is taken by something else.
    """
    child = getattr(owner, name, None)
    weights = inside(name, child)
    if child is not None and weights is None:
        raise LevelWeightsError(
            f"{type(owner).__name__} already has an attribute {name!r} of type {type(child).__name__}, so its level "
            "weights cannot be registered there. Rename it before you convert the model."
        )
    return weights


def attach(owner: nn.Module, name: str, weights: nn.Module) -> None:
    """Registers level weights on the module that owns the mixer, and watches that they are not ignored."""
    owner.add_module(name, weights)
    watch(owner)
    if warn_if_ignored not in owner._forward_hooks.values():
        owner.register_forward_pre_hook(expect_use, with_kwargs=True)
        owner.register_forward_hook(warn_if_ignored, always_call=True)


# A pickled model that is converted comes here, too: it looks its hooks up in this file.
made_before.install(attach)


def attached(model: nn.Module) -> Iterator[tuple[nn.Module, str, LevelWeights]]:
    """(owner, name, level weights) for everything that was attached below `model`."""
    for owner in list(model.modules()):
        for name, weights in list(held(owner)):
            yield owner, name, weights


def ids_attached(model: nn.Module) -> set[int]:
    """The ids of the level weights below `model`, for `detach_new`."""
    return {id(weights) for _, _, weights in attached(model)}


def attached_new(model: nn.Module, before: set[int]) -> list[tuple[nn.Module, str]]:
    """(owner, name) of the level weights below `model` whose ids are not in `before`."""
    return [(owner, name) for owner, name, weights in attached(model) if id(weights) not in before]


def own_parameters(model: nn.Module) -> int:
    """How many parameters a model has without its level weights; lazy ones that have no shape yet are not counted."""
    kept = [copy for owner, name, _ in attached(model) for copy in copies(name, owner._modules[name])]
    levels = {id(p) for weights in kept for p in weights.parameters()}
    return sum(p.numel() for p in model.parameters() if id(p) not in levels and not is_lazy(p))


def detach_new(model: nn.Module, before: set[int]) -> None:
    """Removes the level weights below `model` whose ids are not in `before`."""
    for owner, name in attached_new(model, before):
        detach_one(owner, name)


def detach(model: nn.Module) -> int:
    """Removes all level weights and hooks below `model`; returns how many level weights there were."""
    found = list(attached(model))
    for owner, name, _ in found:
        detach_one(owner, name)
    forget_withheld(model)
    return len(found)


def detach_one(owner: nn.Module, name: str) -> None:
    """Removes the level weights that `owner` has under `name`, and the hook with the last of them."""
    delattr(owner, name)
    if not any(True for _ in held(owner)):
        for hooks in (owner._forward_pre_hooks, owner._forward_hooks):
            for key, hook in list(hooks.items()):
                if hook in (expect_use, warn_if_ignored):
                    del hooks[key]
                    owner._forward_pre_hooks_with_kwargs.pop(key, None)
                    owner._forward_hooks_always_called.pop(key, None)


def function(
    weights: LevelWeights, heads: int, dtype: torch.dtype, readouts: Readouts = whole_rows
) -> Callable[..., Any]:
    """The pure function (x, *tensors) -> w [B, T, heads, L] of these level weights for inputs of `dtype`."""
    computed = compute_dtype(dtype, *(tensor.dtype for _, tensor in weights.tensors()))
    return level_weights_function(weights.kind, heads, weights.levels, computed, readouts)


def expect_use(owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook: from here on, a compiled graph that reads the level weights marks them as used.

    While Dynamo traces it for our backend, it hands the level weights to the graph, as they are in this call. Otherwise
    the input is kept until the call ends, for a graph that begins after a graph break inside of the module.
    """
    if not torch.compiler.is_dynamo_compiling():
        _call_begins(owner, ModuleCall(args, kwargs))
    elif _compiles_for_us():
        for name, child in owner._modules.items():
            if child is not None and holds(name, child):
                mark(name, *values(child))
                if any(not isinstance(parameter, nn.Parameter) for parameter in child.parameters()):
                    for own, tensor in owner.named_parameters():
                        mark(PARAMETER + own, tensor)


@torch.compiler.disable
def _call_begins(owner: nn.Module, call: ModuleCall) -> None:
    if not getattr(owner, "_fsdp_use_orig_params", True) and _is_compiled_by_us():
        wrapped.expect_traceable(owner)
    forget_use(owner)
    _keep_input(owner, call)


@torch.compiler.disable
def _keep_input(owner: nn.Module, call: ModuleCall | None) -> None:
    for _, weights in held(owner):
        weights.owner_input = call.of_width(weights.in_features) if call and weights.in_features else None


def warn_if_ignored(owner: nn.Module, arguments: Any, output: Any) -> None:
    """Forward hook: warns when level weights had no part in an output that was computed eagerly.

    That is meant where nobody asked for our backend, and weights of 1 may be left out; it is not in a call that was
    compiled by us, which Dynamo has left (a function that it skips, a limit of recompilations). After an error (the
    hook is always called) there is no output, and a state that only compiled code can read may be why.
    """
    if not torch.compiler.is_dynamo_compiling():
        _keep_input(owner, None)
        _warn_if_unused(owner, output)


# In the call of a compiled module they run before and after the frame that Dynamo compiles, and are no frames for it.
for _hook in (expect_use, warn_if_ignored):
    leave_out(_hook)


@torch.compiler.disable
def _warn_if_unused(owner: nn.Module, output: Any) -> None:
    all_held = list(held(owner))
    unused = [weights for name, weights in all_held if not is_used(owner, name)]
    if not unused:
        return
    if output is None and sys.exc_info()[1] is not None:
        eager_states.explain(type(owner).__name__, {weights.levels for weights in unused})
    elif _is_compiled_by_us():
        if len(unused) == len(all_held):
            warn_ignored(f"{type(owner).__name__} has level weights and {_LEFT_OUT}")
    elif any(not weights.is_identity() for weights in unused):
        warn_ignored(f"the level weights of {type(owner).__name__} are no longer 1, and the model was run eagerly")


_LEFT_OUT = (
    "ran in a compiled call, but no compiled graph read them: its mixer was declined, or a transform of torch.func ran "
    "the compiled call (compile the function that calls the transform), or Dynamo skipped a function or stopped "
    "compiling (TORCH_LOGS=loglinear,graph_breaks,recompiles shows why; "
    "torch._dynamo.config.recompile_limit limits the graphs per function)"
)


def _is_compiled_by_us() -> bool:
    """Whether this call is part of one that torch.compile runs for our backend, with level weights."""
    backend, keywords = backend_below()
    return runs_levels(backend) and (keywords.get("options") or {}).get("level_weights") != "none"


@torch._dynamo.assume_constant_result
def _compiles_for_us() -> bool:
    return is_ours(has_level_weights=True)
