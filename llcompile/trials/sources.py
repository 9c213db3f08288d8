"""Sources: the files and functions that `--data` names, as batches."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llcompile.errors import MissingLibraryError, TrialError
from llcompile.trials.batches import TRAIN, Source

_HELD_OUT = 10  # one part in ten is held out
BYTES = 256


@dataclass(frozen=True)
class Cut:
    """How tokens are cut: sequences in a batch, tokens of a training sequence, and of a held-out one."""

    batch: int = 16
    length: int = 128
    held_length: int | None = None

    @property
    def longest(self) -> int:
        """Tokens of a held-out sequence: four times those of the training, if nothing else is said."""
        return self.held_length or 4 * self.length


@dataclass(frozen=True)
class Stream:
    """One long text [N]: windows at random places of its first nine tenths; the last tenth is held out."""

    tokens: Tensor
    cut: Cut

    def __post_init__(self) -> None:
        held = len(self.tokens) // _HELD_OUT
        if self.cut.batch < 2 or min(self.cut.length, self.cut.longest) < 2:
            raise TrialError(f"a batch needs at least 2 sequences of 2 tokens, got {self.cut}")
        if held < 2 * (self.cut.longest + 1):
            needed = 2 * _HELD_OUT * (self.cut.longest + 1)
            raise TrialError(
                f"the data have {len(self.tokens):,} tokens; held-out sequences of {self.cut.longest} need at least "
                f"{needed:,}. Give more data, or a shorter length"
            )

    def __call__(self, split: str, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs of tokens and labels, [batch, T] each."""
        bound = len(self.tokens) - len(self.tokens) // _HELD_OUT
        return self._random(bound, seed) if split == TRAIN else self._in_turn(bound)

    def _random(self, bound: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            starts = torch.randint(bound - self.cut.length, (self.cut.batch,), generator=generator)
            yield self._windows(starts.tolist(), self.cut.length)

    def _in_turn(self, bound: int) -> Iterator[tuple[Tensor, Tensor]]:
        starts = range(bound, len(self.tokens) - self.cut.longest, self.cut.longest)
        for first in range(0, len(starts), self.cut.batch):
            if len(chosen := starts[first : first + self.cut.batch]) == min(self.cut.batch, len(starts)):
                yield self._windows(list(chosen), self.cut.longest)

    def _windows(self, starts: list[int], length: int) -> tuple[Tensor, Tensor]:
        windows = torch.stack([self.tokens[start : start + length + 1] for start in starts]).long()
        return windows[:, :-1], windows[:, 1:]


@dataclass(frozen=True)
class Table:
    """Sequences [N, T]: the first nine tenths of the rows in random order, cut to `length`; the others held out."""

    tokens: Tensor
    cut: Cut

    def __post_init__(self) -> None:
        rows, width = self.tokens.shape
        if rows // _HELD_OUT < 2 or self.cut.batch < 2 or self.cut.batch > rows - rows // _HELD_OUT:
            raise TrialError(
                f"the data have {rows} sequences; batches of {self.cut.batch} need as many for training "
                f"and 2 in the tenth that is held out: give more, or another batch size (2 or more)"
            )
        if width < 2 or width < self.cut.length:
            raise TrialError(f"the data have sequences of {width} tokens, shorter than the length {self.cut.length}")

    def __call__(self, split: str, seed: int) -> Iterator[Tensor]:
        """Tokens [batch, T]."""
        bound = len(self.tokens) - len(self.tokens) // _HELD_OUT
        if split != TRAIN:
            held = self.tokens[bound:, : self.cut.longest]
            size = min(self.cut.batch, len(held))
            return (held[i : i + size] for i in range(0, len(held) - size + 1, size))
        return self._random(self.tokens[:bound], seed)

    def _random(self, rows: Tensor, seed: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        room = rows.shape[1] - self.cut.length + 1
        while True:
            order = torch.randperm(len(rows), generator=generator)
            for first in range(0, len(rows) - self.cut.batch + 1, self.cut.batch):
                start = int(torch.randint(room, (), generator=generator))
                yield rows[order[first : first + self.cut.batch], start : start + self.cut.length]


@dataclass(frozen=True)
class Named:
    """The function that `module:function` names, found again in each process."""

    spec: str

    def __call__(self, split: str, seed: int) -> Iterable[Any]:
        """What the function gives for a split and a seed."""
        try:
            found: Iterable[Any] = function(self.spec)(split, seed)
            return found
        except TypeError as error:
            raise TrialError(
                f"{self.spec}({split!r}, {seed}) raised TypeError: {error}; expected a function of a split "
                '("train" or "held out") and a seed that yields batches'
            ) from error


def source(given: Any, cut: Cut) -> Source:
    """Batches from tokens (a tensor [N] or [N, T]) or from a function of a split and a seed.

    Raises:
        TrialError: it is neither, or does not serve.
    """
    if isinstance(given, np.ndarray):
        given = torch.from_numpy(given)
    if isinstance(given, Tensor):
        if given.is_floating_point() or given.is_complex() or given.dim() not in (1, 2):
            raise TrialError(
                f"the data are a {given.dtype} tensor {list(given.shape)}; expected whole numbers [N] or [N, T]"
            )
        return (Stream if given.dim() == 1 else Table)(given, cut)
    if callable(given):
        found: Source = given
        return found
    raise TrialError(
        f"batches is a {type(given).__name__}; expected tokens [N] or [N, T], or a function of a split and a seed "
        "that yields batches"
    )


def is_function(spec: str) -> bool:
    """Whether `--data` names a function, and not a file."""
    return ":" in spec and not Path(spec).exists()


def named(spec: str, cut: Cut) -> Source:
    """Batches from what `--data` names: a file of tokens, `module:function`, or else a file that is read as bytes.

    Raises:
        TrialError: there is nothing of that name, or it does not serve.
    """
    path = Path(spec)
    if is_function(spec):
        function(spec)  # fails now and not in the first batch
        return Named(spec)
    if not path.is_file():
        what = "it is a folder" if path.is_dir() else "no such file"
        raise TrialError(f"--data {spec}: {what}; expected a text, tokens (.pt, .npy, .safetensors) or module:function")
    reader = _READERS.get(path.suffix, _read_bytes)
    try:
        tokens = reader(path)
    except (MissingLibraryError, TrialError):
        raise
    except Exception as error:  # whatever a library says about a broken file
        raise TrialError(f"--data {spec} cannot be read: {type(error).__name__}: {error}") from error
    try:
        return source(tokens, cut)
    except TrialError as error:
        raise TrialError(f"--data {spec}: {error}") from error


def _read_bytes(path: Path) -> Tensor:
    return torch.from_numpy(np.fromfile(path, dtype=np.uint8))


def _read_torch(path: Path) -> Any:
    return _the_tensor(torch.load(path, map_location="cpu", weights_only=True), path)


def _read_numpy(path: Path) -> Tensor:
    return torch.from_numpy(np.load(path, allow_pickle=False))


def _read_safetensors(path: Path) -> Tensor:
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise MissingLibraryError("reading .safetensors needs safetensors: pip install safetensors") from None
    return _the_tensor(load_file(path), path)


def _the_tensor(held: Any, path: Path) -> Tensor:
    """The one tensor that a file holds, bare or by a name."""
    if isinstance(held, dict):
        tensors = [x for x in held.values() if isinstance(x, Tensor)]
        held = held.get("tokens", held.get("input_ids", tensors[0] if len(tensors) == 1 else None))
    if not isinstance(held, Tensor):
        raise TrialError(f"--data {path} holds no tensor of tokens; expected one tensor, or one named `tokens`")
    return held


_READERS: dict[str, Callable[[Path], Tensor]] = {
    ".pt": _read_torch,
    ".npy": _read_numpy,
    ".safetensors": _read_safetensors,
}


def function(spec: str, option: str = "--data") -> Callable[..., Any]:
    """The function that `module:function` names on the command line.

    Raises:
        TrialError: it cannot be imported; `option` names the argument in the message.
    """
    module_name, _, name = spec.partition(":")
    sys.path.insert(0, os.getcwd())  # as for SPEC
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's file raises
        raise TrialError(f"{option} {spec}: cannot import {module_name!r}: {type(error).__name__}: {error}") from error
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(os.getcwd())
    found: Callable[..., Any] | None = getattr(module, name, None)
    if not callable(found):
        raise TrialError(f"{option} {spec}: module {module_name!r} has no function {name!r}")
    return found
