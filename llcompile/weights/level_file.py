"""Files of level weights alone: what a fine-tuning of them has made, for the model that it began with."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Any

from torch import Tensor, nn

from llcompile.errors import CheckpointError, LevelWeightsError
from llcompile.torch_internals.dtensors import first_of_mesh, like, whole
from llcompile.weights import SECTION, attachment, checkpoint, tensor_files, wrapped
from llcompile.weights.held import active
from llcompile.weights.inner_names import inner_modules
from llcompile.weights.level_weights import LevelWeights


def save_levels(model: nn.Module, path: str | PathLike[str]) -> int:
    """Write a model's level weights, and nothing else, to a safetensors file for `load_levels`.

    Args:
        model: a converted model. If it is sharded over processes (FSDP2, tensor parallel), all of them must make this
            call; the first one writes, and the file is there when the call returns.
        path: the file; it is replaced if it exists.

    Returns:
        Number of level weights (one per converted mixer) in the file.

    Raises:
        ModelError: `model` is not an nn.Module.
        LevelWeightsError: the model has no level weights; nothing is written.
        OutputError: the file cannot be written.
        MissingLibraryError: safetensors is not installed.
    """
    checkpoint.expect_module(model)
    section = checkpoint.section(model)
    if section is None:
        raise LevelWeightsError(
            f"llcompile.save_levels: {type(model).__name__} has no level weights to write. Call "
            "llcompile.convert(model, *inputs) first, or load a checkpoint that has them."
        )
    modules = inner_modules(model)
    found: dict[str, Tensor] = {}
    for name in section["mixers"]:
        owner, _, attribute = name.rpartition(".")
        for key, tensor in _in_use(modules[owner], attribute, name).state_dict().items():
            found[f"{name}.{key}"] = tensor.detach()
    tensors = {name: whole(tensor).cpu().contiguous().clone() for name, tensor in found.items()}
    with first_of_mesh(found.values()) as is_first:
        if is_first:
            library = tensor_files.safetensors_library()
            with tensor_files.writing(path):
                library.save_file(tensors, str(path), metadata={SECTION: json.dumps(section)})
    return len(section["mixers"])


def load_levels(model: nn.Module, path: str | PathLike[str]) -> int:
    """Load a file written by `save_levels` into a model of the same structure, converted or not.

    Args:
        model: changed in place. Level weights are attached where it has none, without example inputs, and checked
            against the mixers at the first compiled call. Its other weights are not touched. Those of a model on
            device `meta` get their values, on the CPU. Sharded ones (FSDP2, tensor parallel) get each process's part;
            all processes must make this call.
        path: the file. It may have been written from a model that wraps this one, or that this one wraps. A whole
            checkpoint serves as well, also one of several files (a folder or an index), see `llcompile.load`.

    Returns:
        Number of level weights (one per converted mixer) that were loaded.

    Raises:
        ModelError: `model` is not an nn.Module.
        CheckpointError: the file has no level weights, the model lacks a module that they belong to, or has level
            weights of another kind or size, or of mixers that the file does not know. The model is unchanged.
        DistributedError: level weights would be attached, and DDP or FSDP was applied before.
        MissingLibraryError: safetensors is not installed.
    """
    checkpoint.expect_module(model)
    section, tensors = _read(path)
    owners = _owners(model, section, path)
    _expect_all(model, owners, path)
    filled = [(place, _filled(model, place, section["mixers"][name], name, tensors)) for name, place in owners.items()]
    wrapped.expect_none(owner for (owner, name), _ in filled if getattr(owner, name, None) is None)
    for (owner, attribute), (weights, values) in filled:
        if getattr(owner, attribute, None) is None:
            attachment.attach(owner, attribute, weights)
        own = weights.state_dict()
        placed = {key: like(value, own[key]) for key, value in values.items()}
        weights.load_state_dict(placed, assign=any(tensor.is_meta for tensor in own.values()))
    return len(filled)


def _in_use(owner: nn.Module, attribute: str, name: str) -> LevelWeights:
    """The level weights that count in a model."""
    weights = active(owner, attribute)
    if not isinstance(weights, LevelWeights):
        raise LevelWeightsError(
            f"{name} is a {type(weights).__name__}, which computes level weights from its own tensors. Merge it first "
            "(PEFT: model.merge_and_unload())."
        )
    return weights


_Place = tuple[nn.Module, str]  # a module, and the name of level weights there


def _read(path: str | PathLike[str]) -> tuple[Mapping[str, Any], dict[str, Tensor]]:
    """The section of a checkpoint, and the tensors that it tells of."""
    files = tensor_files.files_of(path)
    section = tensor_files.section_of(files)
    if not isinstance(section, Mapping) or not isinstance(section.get("mixers"), Mapping) or not section["mixers"]:
        raise CheckpointError(
            f"{path} has no level weights: its header has no section {SECTION!r}. Write it with llcompile.save_levels."
        )
    mixers = section["mixers"]
    return section, tensor_files.read(files, lambda name: name.rpartition(".")[0] in mixers)


def _owners(model: nn.Module, section: Mapping[str, Any], path: str | PathLike[str]) -> dict[str, _Place]:
    """Name in the file -> where it belongs in the model."""
    modules = inner_modules(model)
    names = list(section["mixers"])
    places = {name: name.rpartition(".")[::2] for name in names}
    change = _prefixes([owner for owner, _ in places.values()], modules)
    if change is None:
        missing = [owner for owner, _ in places.values() if owner not in modules]
        raise CheckpointError(
            f"{path} has level weights of {len(names)} mixers, and {type(model).__name__} has no module "
            f"{missing[0]!r}{f' (nor {len(missing) - 1} others)' if len(missing) > 1 else ''}. Load it into a model of "
            "the structure that it was saved from."
        )
    removed, added = change
    return {name: (modules[added + owner.removeprefix(removed)], own) for name, (owner, own) in places.items()}


def _prefixes(owners: list[str], modules: Iterable[str]) -> tuple[str, str] | None:
    """What is to be removed from, and added before, the names of owners so that all are in the model."""
    known = set(modules)
    parts = owners[0].split(".")
    removed = [".".join(parts[:count]) + "." if count else "" for count in range(len(parts))]
    last = owners[0].rpartition(".")[2]
    added = {""} | {name[: -len(owners[0])] for name in known if last and name.endswith("." + owners[0])}
    for prefix in removed:
        for more in sorted(added, key=len) if not prefix else [""]:
            if all(owner.startswith(prefix) and more + owner.removeprefix(prefix) in known for owner in owners):
                return prefix, more
    return None


def _expect_all(model: nn.Module, owners: Mapping[str, _Place], path: str | PathLike[str]) -> None:
    """Level weights that the file does not know would keep values of another training."""
    known = {(id(owner), name) for owner, name in owners.values()}
    names = {id(module): name for name, module in model.named_modules()}
    for owner, name, _ in attachment.attached(model):
        if (id(owner), name) not in known:
            raise CheckpointError(
                f"{path} has no level weights for {names[id(owner)] or type(model).__name__}.{name}, which the model "
                "has. Call llcompile.revert(model) before you load it, or convert both models on the same inputs."
            )


def _filled(
    model: nn.Module, place: _Place, entry: Mapping[str, Any], name: str, tensors: Mapping[str, Tensor]
) -> tuple[LevelWeights, dict[str, Tensor]]:
    """The level weights of a place, new ones where it has none, and what the file has for them; all checked."""
    owner, attribute = place
    made = checkpoint.new_weights(owner, attribute, entry)
    fresh = attachment.find(owner, attribute) is None
    weights = made if fresh else _in_use(owner, attribute, name)
    if (weights.kind, weights.sizes) != (made.kind, made.sizes):
        raise CheckpointError(
            f"{name}: the file's level weights are {made.extra_repr()}, this model's are {weights.extra_repr()}. Call "
            "llcompile.revert(model) before you load the file, or convert the model with the same options."
        )
    values = {key: tensors[f"{name}.{key}"] for key in weights.state_dict() if f"{name}.{key}" in tensors}
    own = weights.state_dict()
    wrong = [key for key, tensor in own.items() if key not in values or values[key].shape != tensor.shape]
    if wrong:
        shown = list(values[wrong[0]].shape) if wrong[0] in values else "missing"
        raise CheckpointError(
            f"{name}: {wrong[0]} is {shown} in the file, expected {list(own[wrong[0]].shape)}; the file is damaged."
        )
    return weights, values
