"""Files of adapters: level weights that they hold are attached to a base model that has none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from llcompile.errors import CheckpointError
from llcompile.weights import adapters, attachment, checkpoint, wrapped
from llcompile.weights.descriptors import entry_of
from llcompile.weights.held import PREFIX

# What PEFT's names begin with, in its files and in its models.
_OUTER = "base_model.model."
_DESCRIPTOR = "descriptor"

Place = tuple[nn.Module, str]  # a module, and the name of level weights there


def make_room(model: nn.Module, tensors: Mapping[str, Any]) -> list[Place]:
    """Attaches level weights, at their start of 1, where an adapter's file has some and the model has none.

    Args:
        model: the base model, or one of PEFT's around it.
        tensors: those of the file by their names; of others than the descriptors only the names count.

    Returns:
        Where level weights were attached.

    Raises:
        CheckpointError: the file changes level weights of the base model, which it has none of, or a descriptor cannot
            be read. The model is unchanged.
        DistributedError: DDP or FSDP was applied before.
    """
    lacking = dict(_lacking(model, tensors))
    for path, (owner, name) in lacking.items():
        if f"{path}.{_DESCRIPTOR}" not in tensors:
            raise CheckpointError(
                f"the adapter's file changes the level weights {path}, and {type(owner).__name__} has no {name!r}. "
                "Convert the base model, or load its level weights (llcompile.load_levels), before the adapter."
            )
    wrapped.expect_none(owner for owner, _ in lacking.values())
    entries = [(place, entry_of(tensors[f"{path}.{_DESCRIPTOR}"])) for path, place in lacking.items()]
    made = [(owner, name, checkpoint.new_weights(owner, name, entry)) for (owner, name), entry in entries]
    for owner, name, weights in made:
        attachment.attach(owner, name, weights.requires_grad_(False))
    return [(owner, name) for owner, name, _ in made]


def make_room_in_adapter(model: nn.Module, tensors: Mapping[str, Tensor], adapter: str) -> None:
    """As `make_room`, for a model that has the adapter: it gets copies of its own of what is new.

    Raises:
        CheckpointError, DistributedError: as `make_room`.
    """
    configs, active = adapters.adapters_of(model)
    for owner, name in make_room(model, tensors):
        adapters.keep_for(owner, name, [adapter], [adapter] if adapter in active else [])
        if getattr(configs.get(adapter), "inference_mode", False):
            owner._modules[name].requires_grad_(False)  # type: ignore[union-attr]


def _lacking(model: nn.Module, tensors: Mapping[str, Any]) -> Iterator[tuple[str, Place]]:
    """(name in the file, place) of level weights whose owner the model has and that the owner lacks."""
    modules = dict(model.named_modules())
    for key in tensors:
        parts = key.split(".")
        at = next((i for i, part in enumerate(parts) if part.startswith(PREFIX)), None)
        if at is None:
            continue
        path = ".".join(parts[:at])
        owner = modules.get(path, modules.get(path.removeprefix(_OUTER).removeprefix(_OUTER.rstrip("."))))
        if owner is not None and not hasattr(owner, parts[at]):
            yield ".".join(parts[: at + 1]), (owner, parts[at])
