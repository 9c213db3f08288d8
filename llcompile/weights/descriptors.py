"""Descriptors: what a checkpoint says of level weights, as a tensor [2 + sizes] of integers among their own."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from llcompile.errors import CheckpointError
from llcompile.weights.level_kinds import KINDS, Sizes

_LAYOUT_VERSION = 1


def description(code: int, sizes: Sizes) -> list[int]:
    """The numbers of a descriptor. Those that read no buckets have no features, and had none before."""
    return [_LAYOUT_VERSION, code, *(sizes if sizes.features else sizes[:-1])]


def in_words(descriptor: Tensor) -> str:
    """Kind and sizes, for a message."""
    entry = _read(descriptor)
    if entry is None:
        return f"of a layout unknown to this version ({_numbers(descriptor)})"
    kind = f"kind={entry.pop('kind') or 'unknown'!r}"
    return ", ".join([kind, *(f"{name}={size}" for name, size in entry.items())])


def entry_of(descriptor: Tensor) -> dict[str, Any]:
    """Kind and sizes as `checkpoint.new_weights` takes them; sizes of 0 are left out.

    Raises:
        CheckpointError: a layout or a kind that this version does not know.
    """
    entry = _read(descriptor)
    if entry is None or entry["kind"] is None:
        raise CheckpointError(
            f"the checkpoint has level weights {in_words(descriptor)}. Install the version of llcompile that wrote it."
        )
    return entry


def _read(descriptor: Tensor) -> dict[str, Any] | None:
    numbers = _numbers(descriptor)
    if len(numbers) not in (1 + len(Sizes._fields), 2 + len(Sizes._fields)) or numbers[0] != _LAYOUT_VERSION:
        return None
    kinds = {kind.code: kind.name for kind in KINDS.values()}
    sizes = zip(Sizes._fields, numbers[2:], strict=False)
    return {"kind": kinds.get(numbers[1]), **{name: size for name, size in sizes if size}}


def _numbers(descriptor: Tensor) -> list[int]:
    return [int(number) for number in descriptor.flatten().tolist()]
