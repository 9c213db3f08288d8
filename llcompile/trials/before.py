"""Before: what must hold before anything is trained. A trial takes long, and must not end in its first measure."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from llcompile.errors import TrialDataWarning, TrialError
from llcompile.trials import batches
from llcompile.trials.batches import HELD_OUT, IGNORED, TRAIN, Batch, Source
from llcompile.trials.outputs import inputs, logits_of
from llcompile.trials.running import OwnLoss
from llcompile.trials.store import digest
from llcompile.trials.training import cross_entropy, told
from llcompile.trials.verdict import WHERE


def first(source: Source) -> Batch:
    """The first training batch of seed 0, by which a folder knows its data.

    Raises:
        TrialError: it is another one at each call.
    """
    found, again = (next(batches.training(source, 0, 1)) for _ in range(2))
    if not (torch.equal(found.tokens, again.tokens) and torch.equal(found.labels, again.labels)):
        raise TrialError(
            f"batches({TRAIN!r}, 0) gives other batches at each call, so arms could not be compared; draw them "
            "with a generator that the seed determines"
        )
    return found


def warn_of_splits(example: Batch, held: Batch) -> None:
    """Warn where the held-out batches are those of a training, as of a function that ignores its split."""
    if torch.equal(example.tokens, held.tokens) and bool((example.tokens != example.tokens[0, 0]).any()):
        warnings.warn(
            TrialDataWarning(
                "the first held-out batch is the first training batch of seed 0, so that this seed is judged on what "
                f"it was trained on; for the split {HELD_OUT!r}, give sequences that no training has"
            ),
            stacklevel=2,
        )


def check_part(held: Sequence[Batch], part: str, trained: int) -> None:
    """Raises TrialError where no held-out label is at the positions that are judged."""
    places = {"inside": slice(0, trained), "beyond": slice(trained, None), "all": slice(None)}[part]
    if not any(bool((batch.labels[:, places] != IGNORED).any()) for batch in held):
        raise TrialError(
            f"no held-out sequence has a label {WHERE[part]}, so that nothing could be judged: they have "
            f"{held[0].tokens.shape[1]} tokens, those of the training {trained}. Judge another `part` (--part), "
            "or give other sequences"
        )


def check_runs(model: nn.Module, example: Batch, held: Batch, loss: OwnLoss | None) -> None:
    """Raises TrialError where the model does not run on a batch of either split, or its loss there is no number."""
    hint = "give shorter ones (`held_length`, --held-length), or a model that takes them"
    _check_batch(model.train(), example, loss, "the first training batch", "")
    _check_batch(model.eval(), held, loss, "the first held-out batch", hint)
    model.train()


def known(given: Sequence[Batch]) -> str:
    """A short name for the values of batches."""
    values = {f"tokens {i}": batch.tokens for i, batch in enumerate(given)}
    return digest(values | {f"labels {i}": batch.labels for i, batch in enumerate(given)})


@torch.no_grad()
def _check_batch(model: nn.Module, batch: Batch, loss: OwnLoss | None, what: str, hint: str) -> None:
    with told(f"the model does not run on {what}", batch, hint):
        output = loss(model, batch) if loss is not None else model(batch.tokens, **inputs(model, batch))
    value = _own(output) if loss is not None else _of_logits(logits_of(output), batch)
    if not math.isfinite(value):
        raise TrialError(
            f"the model's loss on {what} {list(batch.tokens.shape)} is {value} before it is trained, so that nothing "
            "can be compared; check its weights, and whether its dtype is too small for them"
        )


def _own(output: object) -> float:
    if not isinstance(output, Tensor) or output.numel() != 1:
        raise TrialError(f"loss(model, batch) gave {output!r:.100}; expected a tensor with one number")
    return float(output)


def _of_logits(logits: Tensor, batch: Batch) -> float:
    if logits.shape[:2] != batch.tokens.shape or logits.shape[2] <= int(batch.labels.max()):
        raise TrialError(
            f"the model gave logits {list(logits.shape)} for tokens {list(batch.tokens.shape)} with labels up to "
            f"{int(batch.labels.max())}; expected [B, T, vocabulary] with a larger vocabulary"
        )
    return float(cross_entropy(logits, batch.labels))
