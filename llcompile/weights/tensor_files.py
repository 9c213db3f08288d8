"""Files of safetensors: one, or several with an index, as `save_pretrained` writes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from llcompile.errors import CheckpointError, MissingLibraryError, OutputError
from llcompile.weights import SECTION


def safetensors_library() -> Any:
    """The torch part of safetensors, or MissingLibraryError."""
    try:
        import safetensors.torch as library
    except ImportError as error:
        raise MissingLibraryError("checkpoints of llcompile need safetensors: pip install safetensors") from (error)
    return library


@contextmanager
def writing(path: str | PathLike[str]) -> Iterator[None]:
    """Tells of a file that safetensors cannot write: its folder does not exist or is not writable, the disk is full.

    Raises:
        OutputError: it cannot.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError) as error:
        at = Path(path)
        reason = str(error) if at.parent.is_dir() else f"the folder {at.parent} does not exist"
        raise OutputError(f"cannot write {path}: {reason}.") from error


def files_of(path: str | PathLike[str]) -> list[Path]:
    """The files of a checkpoint: of a folder or an index those that the index names, otherwise the file itself.

    Raises:
        CheckpointError: there are none, or no telling which.
    """
    at = Path(path)
    if at.is_dir():
        found = sorted(at.glob("*.safetensors.index.json")) or sorted(at.glob("*.safetensors"))
        if len(found) != 1:
            raise CheckpointError(
                f"{path} has {len(found)} safetensors files and no single index of them (*.safetensors.index.json). "
                "Name the file or the index to load."
            )
        at = found[0]
    if at.suffix != ".json":
        return [at]
    try:
        return [at.parent / name for name in sorted(set(json.loads(at.read_text())["weight_map"].values()))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{at} is no index of safetensors files: it has no weight_map") from error


def section_of(files: Sequence[Path]) -> Any:
    """What a checkpoint says of its level weights: in the header of a file, else in config.json beside it; or None.

    Raises:
        CheckpointError: a file cannot be read.
    """
    for file in files:
        text = _opened(file, lambda opened: (opened.metadata() or {}).get(SECTION))
        if text is not None:
            return _parsed(text, file).get(SECTION)
    config = files[0].with_name("config.json") if files else None
    return _parsed(config.read_text(), config).get(SECTION) if config is not None and config.is_file() else None


def read(files: Sequence[Path], wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """The tensors of a checkpoint whose names are wanted, on the CPU.

    Raises:
        CheckpointError: a file cannot be read.
    """
    found: dict[str, Tensor] = {}
    for file in files:
        found |= _opened(file, lambda opened: {n: opened.get_tensor(n) for n in opened.keys() if wanted(n)})  # noqa: SIM118
    return found


def _opened(file: Path, use: Callable[[Any], Any]) -> Any:
    safetensors_library()
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt") as opened:
            return use(opened)
    except SafetensorError as error:
        raise CheckpointError(f"{file} cannot be read as a safetensors file: {error}") from error


def _parsed(text: str, file: Path) -> dict[str, Any]:
    """{SECTION: section} of a header's text, or a whole config.json."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{file} cannot be read: its section {SECTION!r} is damaged: {error}") from error
    return found if file.suffix == ".json" and isinstance(found, dict) else {SECTION: found}
