"""Checkpoints: what has to be written beside the weights so that a converted model comes back without example inputs.

For models of transformers, `save_pretrained` and `from_pretrained` do it (`autoload.pretrained`); `save` and
`load` are for all others.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from typing import Any

from torch import Tensor, nn

from llcompile import __version__
from llcompile.errors import CheckpointError, ModelError
from llcompile.passes.names import CodePlace
from llcompile.torch_internals.dtensors import is_dtensor
from llcompile.weights import SECTION, attachment, tensor_files, wrapped
from llcompile.weights.held import held
from llcompile.weights.inner_names import COMPILED, inner_modules, inner_name
from llcompile.weights.level_kinds import Sizes
from llcompile.weights.level_weights import LevelWeights

VERSION = 1


def section(model: nn.Module) -> dict[str, Any] | None:
    """What `restore` needs of a model's level weights, for JSON; None if it has none.

    `{"version": 1, "llcompile": "0.1.0", "mixers": {"layers.0.mixer.loglinear": {"kind": "linear", "heads": 8,
    "levels": 15, "in_features": 64}}}`; a module with several mixers also says where in its code each of them stands.
    """
    mixers: dict[str, Any] = {}
    for path, owner in model.named_modules():
        own = list(held(owner))
        for name, weights in own:
            mixers[_plain(f"{path}.{name}").lstrip(".")] = _entry(weights, several=len(own) > 1)
    return {"version": VERSION, "llcompile": __version__, "mixers": mixers} if mixers else None


def restore(model: nn.Module, section: Mapping[str, Any], prefix: str = "") -> list[LevelWeights]:
    """Attaches the level weights that a section tells of, at their start of 1; returns the new ones.

    Names that the model has no module for are left alone, with `prefix` and without; so are level weights that are
    there.

    Raises:
        CheckpointError: the section is of a later layout, or damaged.
        DistributedError: DDP or FSDP was applied before.
    """
    places = [p for p in _places(model, section, prefix) if attachment.find(p[0], p[1]) is None]
    wrapped.expect_none(owner for owner, _, _ in places)
    made = [(owner, name, new_weights(owner, name, entry)) for owner, name, entry in places]
    for owner, name, weights in made:
        attachment.attach(owner, name, weights)
    return [weights for _, _, weights in made]


def save(model: nn.Module, path: str | PathLike[str]) -> None:
    """Write a model's weights, level weights included, to one safetensors file for `load`.

    Args:
        model: any nn.Module; shared tensors are written once. What `torch.compile` returns is saved as the model in it.
        path: the file.

    Raises:
        ModelError: `model` is not an nn.Module.
        CheckpointError: the model is sharded over processes; nothing is written.
        OutputError: the file cannot be written.
        MissingLibraryError: safetensors is not installed.
    """
    expect_module(model)
    _expect_unsharded(model, f"{type(model).__name__} cannot be saved to {path}")
    model = _uncompiled(model)
    found = section(model)
    library = tensor_files.safetensors_library()
    with tensor_files.writing(path):
        library.save_model(model, str(path), metadata={} if found is None else {SECTION: json.dumps(found)})


def load(model: nn.Module, path: str | PathLike[str]) -> int:
    """Load a checkpoint into a model of the same structure, converted or not, without example inputs.

    Args:
        model: changed in place; level weights are attached to the modules that had them in the saved model, and
            checked against the model's mixers at the first compiled call.
        path: a file written by `save`; or a folder, an index or a file written by `save_pretrained`, in one or
            several safetensors files.

    Returns:
        Number of level weights that were attached.

    Raises:
        ModelError: `model` is not an nn.Module.
        CheckpointError: the files do not fit the model or cannot be read, or the model is on device `meta` or sharded
            over processes; it has the weights that it had.
        DistributedError: level weights would be attached, and DDP or FSDP was applied before.
        MissingLibraryError: safetensors is not installed.
    """
    expect_module(model)
    model = _uncompiled(model)
    files = tensor_files.files_of(path)
    found = tensor_files.section_of(files)
    _expect_memory(model, path)
    _expect_unsharded(model, f"{path} cannot be loaded into {type(model).__name__}")
    tensors = tensor_files.read(files)
    before = attachment.ids_attached(model)
    made = [] if found is None else restore(model, found)
    try:
        _expect_kinds(model, found or {"version": VERSION, "mixers": {}})
        own = {_plain(name): name for name in model.state_dict()}
        tensors = {own.get(_plain(name), name): tensor for name, tensor in tensors.items()}
        _expect_names(model, tensors)
        model.load_state_dict(tensors, strict=False)
    except (RuntimeError, CheckpointError) as error:
        attachment.detach_new(model, before)
        raise CheckpointError(f"{path} does not fit {type(model).__name__}: {error}") from error
    return len(made)


def _plain(name: str) -> str:
    return inner_name(name, COMPILED)


def _uncompiled(model: nn.Module) -> nn.Module:
    """The model that `torch.compile(model)` holds: a file has the same names whichever of them is saved."""
    inner = getattr(model, COMPILED, model)
    return inner if isinstance(inner, nn.Module) else model


def _expect_kinds(model: nn.Module, section: Mapping[str, Any]) -> None:
    """Level weights that are there have other tensors if they are of another kind."""
    for owner, name, entry in _places(model, section):
        weights = attachment.find(owner, name)
        if weights is not None and weights.kind != entry.get("kind"):
            raise CheckpointError(
                f"its level weights {name} of {type(owner).__name__} are of kind {entry.get('kind')!r}, those of the "
                f"model of kind {weights.kind!r}. Call llcompile.revert(model) first, and the file's take their place."
            )


def _expect_names(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """All tensors of a checkpoint, and no others; of those that share memory one is enough."""
    own = model.state_dict()
    filled = {_memory(own[name]) for name in tensors if name in own}
    missing = [name for name, tensor in own.items() if name not in tensors and _memory(tensor) not in filled]
    unexpected = [name for name in tensors if name not in own]
    wrong = [name for name, tensor in tensors.items() if name in own and own[name].shape != tensor.shape]
    # Level weights say themselves what is wrong with theirs.
    wrong = [name for name in wrong if not _is_level(model, name)]
    for what, names in (("it lacks", missing), ("it has, and the model has not,", unexpected)):
        if names:
            raise CheckpointError(f"{what} {names[0]}" + (f" and {len(names) - 1} more" if names[1:] else ""))
    if wrong:
        raise CheckpointError(f"{wrong[0]} is {list(tensors[wrong[0]].shape)}, not {list(own[wrong[0]].shape)}")


def _memory(tensor: Tensor) -> tuple[Any, ...]:
    return (tensor.device, tensor.data_ptr(), tensor.numel()) if tensor.numel() else (id(tensor),)


def _is_level(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name.rpartition(".")[0]), LevelWeights)


def _expect_unsharded(model: nn.Module, what: str) -> None:
    """A file holds whole tensors; each process has a part of a DTensor."""
    sharded = next((name for name, tensor in model.state_dict().items() if is_dtensor(tensor)), None)
    if sharded is not None:
        raise CheckpointError(
            f"{what}: {sharded} is sharded over processes. Use torch.distributed.checkpoint for the whole model, "
            "whose StateDictOptions(full_state_dict=True) gathers whole tensors and spreads them, or "
            "llcompile.save_levels and load_levels for the level weights."
        )


def _expect_memory(model: nn.Module, path: str | PathLike[str]) -> None:
    """Values that are copied to device `meta` are lost."""
    names = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if names:
        raise CheckpointError(
            f"{path} cannot be loaded into {type(model).__name__}: {names[0]} and {len(names) - 1} more of its tensors "
            "are on device meta and hold no values. Call model.to_empty(device='cpu'), or create the model outside of "
            "torch.device('meta')."
        )


def expect_whole(models: Iterable[nn.Module | None]) -> None:
    """Level weights that the configuration of a model tells of must be there.

    They are not if a process that knew nothing of llcompile has opened the checkpoint.

    Raises:
        CheckpointError: a model has none of them.
    """
    for model in models:
        said = "" if model is None else dropped(model)
        if said:
            raise CheckpointError(said)


def dropped(model: nn.Module) -> str:
    """What to do about level weights that the configuration of `model` tells of and that it has not; "" if it has."""
    found = _config(model).get(SECTION)
    if not isinstance(found, Mapping) or any(True for _ in attachment.attached(model)):
        return ""
    count = len(list(_places(model, found)))
    if not count:
        return ""
    return (
        f"{type(model).__name__} was loaded from a checkpoint with the level weights of {count} mixers, but has "
        "none of them: llcompile was not imported before from_pretrained. Import llcompile first and load the model "
        "again, or call llcompile.revert(model) to continue without them."
    )


def forget(model: nn.Module) -> None:
    """Takes the section out of the configurations of a model: its level weights are given up."""
    for module in model.modules():
        _config(module).pop(SECTION, None)


def _config(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module's configuration, if it has one that is an object."""
    held = getattr(getattr(module, "config", None), "__dict__", {})
    return held if isinstance(held, dict) else {}


def _entry(weights: LevelWeights, several: bool) -> dict[str, Any]:
    entry = {"kind": weights.kind, **{n: size for n in Sizes._fields if (size := getattr(weights.sizes, n))}}
    if several and weights.place is not None:
        place = weights.place
        entry["place"] = {"lines": place.lines, "operands": sorted(place.operands), "number": place.number}
    return entry


def _places(
    model: nn.Module, section: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[nn.Module, str, Mapping[str, Any]]]:
    """(owner, name, entry) of each entry that the model has an owner for."""
    layout = section.get("version") if isinstance(section, Mapping) else None
    if layout is None or (layout == VERSION and not isinstance(section.get("mixers"), Mapping)):
        raise CheckpointError(
            f"the checkpoint's section {SECTION!r} is damaged: expected an object with a version and mixers, got "
            f"{section!r:.100}. Save the model again, or remove the section to load it without level weights."
        )
    if layout != VERSION:
        raise CheckpointError(
            f"the checkpoint's section {SECTION!r} has layout {layout!r}, and this version of "
            f"llcompile ({__version__}) reads {VERSION}. Install the version that wrote it: "
            f"{section.get('llcompile')}"
        )
    modules = inner_modules(model)
    for path, entry in section["mixers"].items():
        parent, _, name = _plain(path).rpartition(".")
        owner = modules.get(parent, modules.get(parent.removeprefix(prefix)) if prefix else None)
        if owner is not None:
            yield owner, name, entry


def new_weights(owner: nn.Module, name: str, entry: Mapping[str, Any]) -> LevelWeights:
    """New level weights as an entry of a section tells of them, not attached yet; CheckpointError if it cannot."""
    try:
        widths = (entry.get(width) for width in ("hidden", "features"))
        weights = attachment.make(
            entry["kind"], entry["heads"], entry["levels"], entry.get("in_features"), owner, *widths
        )
        place = entry.get("place")
        if place is not None:
            lines = tuple((function, line) for function, line in place["lines"])
            weights.place = CodePlace(lines, frozenset(place["operands"]), place["number"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        mixer = f"{name} of {type(owner).__name__}"
        raise CheckpointError(
            f"the checkpoint's section {SECTION!r} cannot be read: {mixer} is {entry}: {error}"
        ) from error
    return weights


def expect_module(model: Any) -> None:
    """Raises ModelError for what is no module."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected an nn.Module, got {type(model).__name__}")
