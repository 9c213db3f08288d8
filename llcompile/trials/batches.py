"""Batches: what a trial's data must look like, in every form in which users have it."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llcompile.arguments import in_a_line
from llcompile.errors import LLCompileError, TrialError

IGNORED = -100  # what cross_entropy leaves out
TRAIN, HELD_OUT = "train", "held out"
# `source(split, seed)` gives an iterable of batches; split is TRAIN or HELD_OUT.
Source = Callable[[str, int], Iterable[Any]]
_TOKENS = ("tokens", "input_ids")


@dataclass(frozen=True)
class Batch:
    """One batch.

    Args:
        tokens: [B, T], int64.
        labels: [B, T], int64: the right token for the logits at the same position; -100 where none is asked for.
        distance: [B, T], int64, how far back the answer lies; 0 or less where that is unknown. None if never told.
        inputs: further keyword inputs of the model.
    """

    tokens: Tensor
    labels: Tensor
    distance: Tensor | None = None
    inputs: Mapping[str, Any] = field(default_factory=dict)

    def to(self, device: str) -> Batch:
        """The same batch on another device."""
        inputs = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in self.inputs.items()}
        distance = None if self.distance is None else self.distance.to(device)
        return Batch(self.tokens.to(device), self.labels.to(device), distance, inputs)


def as_batch(given: Any, where: str) -> Batch:
    """A batch from tokens [B, T], a pair (tokens, labels), or a mapping with `tokens` or `input_ids`.

    A mapping may have `labels` and `distance`; what else it holds are keyword inputs of the model. Without labels,
    the next token is the label.

    Raises:
        TrialError: another type, shape or dtype; `where` names the batch in the message.
    """
    if isinstance(given, Batch):
        return given
    if isinstance(given, Tensor):
        given = {"tokens": given}
    elif isinstance(given, (tuple, list)) and len(given) == 2:
        given = {"tokens": given[0], "labels": given[1]}
    if not isinstance(given, Mapping):
        raise TrialError(
            f"{where} is a {type(given).__name__}; expected tokens [B, T], a pair (tokens, labels), or a mapping with "
            "`tokens` (or `input_ids`), and perhaps `labels` and `distance`"
        )
    rest = dict(given)
    name = next((name for name in _TOKENS if name in rest), None)
    if name is None:
        raise TrialError(f"{where} has {', '.join(map(str, rest)) or 'no entries'}; expected `tokens` or `input_ids`")
    tokens = _whole(rest.pop(name), name, where)
    labels = rest.pop("labels", None)
    labels = next_tokens(tokens) if labels is None else _whole(labels, "labels", where, tokens)
    distance = rest.pop("distance", None)
    distance = None if distance is None else _whole(distance, "distance", where, tokens)
    if not bool((labels != IGNORED).any()):
        raise TrialError(f"{where} has no label: all {labels.numel()} of them are {IGNORED}")
    return Batch(tokens, labels, distance, rest)


def next_tokens(tokens: Tensor) -> Tensor:
    """The label of each position: the token after it, and IGNORED at the last one; [B, T]."""
    return F.pad(tokens[:, 1:], (0, 1), value=IGNORED)


def _whole(x: Any, name: str, where: str, like: Tensor | None = None) -> Tensor:
    if not isinstance(x, Tensor) or x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        kind = f"{x.dtype} tensor" if isinstance(x, Tensor) else type(x).__name__
        raise TrialError(f"{where}: {name} must be a tensor of whole numbers [B, T], got a {kind}")
    if x.dim() != 2 or 0 in x.shape or (like is not None and x.shape != like.shape):
        expected = "[B, T]" if like is None else f"{list(like.shape)}, as the tokens"
        raise TrialError(f"{where}: {name} has the shape {list(x.shape)}, expected {expected}")
    return x.long()


def training(source: Source, seed: int, steps: int) -> Iterator[Batch]:
    """The batches of one run, all of one shape.

    Raises:
        TrialError: there are fewer than `steps`, or they differ in shape.
    """
    shape, count = None, 0
    for count, given in enumerate(_given(source, TRAIN, seed, steps), 1):
        batch = as_batch(given, f"training batch {count} of seed {seed}")
        shape = shape or batch.tokens.shape
        if batch.tokens.shape != shape:
            raise TrialError(
                f"training batch {count} of seed {seed} has the shape {list(batch.tokens.shape)}, the first one "
                f"{list(shape)}; give all the same shape (pad, or cut)"
            )
        yield batch
    if count < steps:
        raise TrialError(f"the data end after {count} training batches with seed {seed}; {steps} are needed")


def held_out(source: Source, count: int) -> list[Batch]:
    """The held-out batches, the same for all runs: at most `count`.

    Raises:
        TrialError: there are none, they have fewer than two sequences, or they differ in length.
    """
    batches = [as_batch(x, f"held-out batch {i}") for i, x in enumerate(_given(source, HELD_OUT, 0, count), 1)]
    if not batches:
        raise TrialError(f"the data have no held-out batch: nothing came for the split {HELD_OUT!r}")
    lengths = sorted({batch.tokens.shape[1] for batch in batches})
    if len(lengths) > 1:
        raise TrialError(f"held-out batches have sequences of {lengths} tokens; give all one length")
    if min(batch.tokens.shape[0] for batch in batches) < 2:
        raise TrialError(
            "a held-out batch has one sequence; expected 2 or more: half of them choose, half of them judge"
        )
    return batches


def _given(source: Source, split: str, seed: int, count: int) -> Iterator[Any]:
    """The first `count` things that a source yields.

    Raises:
        TrialError: the source raises something, or gives nothing that can be iterated over.
    """
    try:
        yield from islice(source(split, seed), count)
    except LLCompileError:
        raise
    except Exception as error:  # whatever the user's function raises
        raise TrialError(
            f"batches({split!r}, {seed}) raised {said(error)}; expected a function that yields batches"
        ) from error


def said(error: BaseException) -> str:
    """What an error of the user's code says, and where it was raised: file, line and function."""
    line = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {in_a_line(error):.400} ({line.filename}:{line.lineno} in {line.name})"
