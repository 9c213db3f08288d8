"""Which implementation runs a call: C++ on a CPU, Triton on a GPU, the ATen lowering elsewhere and where they cannot.

The environment variable `LLCOMPILE_KERNELS` or `use` says `auto` (the default), `cpp`, `triton` or `aten`. What was
asked for by name is never replaced in silence: it raises where it cannot run, with the reason. Under `auto` the ATen
lowering runs instead, and a warning gives the reason once (logger `llcompile.kernels`).
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from llcompile.errors import (
    DistributedError,
    KernelCacheError,
    KernelError,
    KernelMemoryError,
    KernelTestError,
    OptionError,
)
from llcompile.kernels import spread
from llcompile.kernels.description import describe, describe_step
from llcompile.kernels.implementations import ATEN, IMPLEMENTATIONS, Described, Implementation, Sweep, preferred
from llcompile.kernels.operands import Operands, Token
from llcompile.kernels.readouts import Readouts, ReadoutToken
from llcompile.kernels.readouts import describe as describe_readouts

VARIABLE = "LLCOMPILE_KERNELS"
CHOICES = ("auto", *IMPLEMENTATIONS)
Result = TypeVar("Result")
_log = logging.getLogger("llcompile.kernels")
_chosen: ContextVar[str | None] = ContextVar("llcompile_kernels", default=None)

# Why an implementation could not be made for a description and a device, where that showed only when it was to run.
_refused: dict[tuple[str, Described, torch.device], str] = {}


@contextlib.contextmanager
def use(choice: str) -> Iterator[None]:
    """Run calls inside by `choice`; raises `OptionError` for an unknown one."""
    token = _chosen.set(_known(choice))
    try:
        yield
    finally:
        _chosen.reset(token)


def portable() -> contextlib.AbstractContextManager[None]:
    """Run calls inside by the ATen lowering: proofs are small, in float64, and must not wait for a compiler."""
    return use(ATEN.name)


def choice() -> str:
    """What is chosen now."""
    return _chosen.get() or _known(os.environ.get(VARIABLE) or "auto")


def forward(x: Operands, scale: float, return_final_state: bool) -> tuple[Tensor, Tensor]:
    """As `aten.sequence.forward`, by the implementation that is chosen, over processes where the sequence is."""
    over = spread.current()
    if over is not None:
        return over.forward(x, scale, return_final_state)
    return _run(
        "forward",
        lambda: describe(x, return_final_state),
        x.v.device,
        lambda one: one.forward(x, scale, return_final_state),
    )


def backward(x: Operands, scale: float, grad_o: Tensor, grad_state: Tensor | None) -> list[Tensor | None]:
    """As `aten.sequence.backward`, likewise."""
    over = spread.current()
    if over is not None:
        return over.backward(x, scale, grad_o, grad_state)
    return _run(
        "backward",
        lambda: describe(x, grad_state is not None),
        x.v.device,
        lambda one: one.backward(x, scale, grad_o, grad_state),
    )


def step(token: Token, routing: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As `Implementation.step`, by the one that is chosen; raises `StateError` for a damaged position."""
    if not token.q.shape[1]:  # no heads: nothing to describe
        return ATEN.step(token, routing)
    return _run("step", lambda: describe_step(token), token.v.device, lambda one: one.step(token, routing))


def step_in_place(token: Token, routing: Tensor | None = None) -> Tensor:
    """As `Implementation.step_in_place`, likewise."""
    if not token.q.shape[1]:
        return ATEN.step_in_place(token, routing)
    return _run(
        "step in place",
        lambda: describe_step(token),
        token.v.device,
        lambda one: one.step_in_place(token, routing),
    )


def replay(x: Operands, occupied: Tensor | None, scale: float) -> Tensor:
    """As `Implementation.replay`, by the implementation that is chosen.

    Raises:
        DistributedError: the sequence is spread over processes.
    """
    _expect_whole(x)
    # What has no kernel of its own is read by a whole pass.
    sweep: Sweep = "replay" if x.q.shape[1] == 1 and x.decay_rate is None else "forward"
    return _run(sweep, lambda: describe(x, False), x.v.device, lambda one: one.replay(x, occupied, scale))


def fold(x: Operands, occupied: Tensor | None, merged: bool) -> Tensor:
    """As `Implementation.fold`, by the implementation that is chosen; raises as `replay`."""
    _expect_whole(x)
    rated = x.decay_rate is not None  # a whole pass, likewise
    sweep: Sweep = "forward" if rated else "fold"
    return _run(sweep, lambda: describe(x, rated), x.v.device, lambda one: one.fold(x, occupied, merged))


def _expect_whole(x: Operands) -> None:
    if spread.current() is not None:
        raise DistributedError(
            f"a ReplayState holds whole sequences (values {list(x.v.shape)} here), and this one is spread over "
            "processes; leave the context to decode"
        )


def readouts(x: Readouts, return_final_state: bool) -> tuple[Tensor, Tensor]:
    """As `aten.readouts.forward`, by the implementation that is chosen.

    Raises:
        DistributedError: the sequence is spread over processes.
    """
    if spread.current() is not None:
        raise DistributedError(
            f"routed level weights read the buckets of a whole sequence (queries {list(x.query.shape)} here), and this "
            "one is spread over processes; convert with level_weights='linear' for context parallel, or leave the "
            "context"
        )
    return _run(
        "forward",
        lambda: describe_readouts(x),
        x.query.device,
        lambda one: one.readouts().forward(x, return_final_state),
    )


def readouts_backward(x: Readouts, grad: Tensor, grad_state: Tensor | None) -> tuple[Tensor | None, ...]:
    """As `aten.readouts.backward`, by the implementation that is chosen."""
    return _run(
        "backward",
        lambda: describe_readouts(x),
        x.query.device,
        lambda one: one.readouts().backward(x, grad, grad_state),
    )


def readouts_step(x: ReadoutToken) -> tuple[Tensor, Tensor]:
    """As `aten.readouts.step`, by the implementation that is chosen."""
    return _run("step", lambda: describe_readouts(x), x.query.device, lambda one: one.readouts().step(x))


def _run(
    sweep: Sweep, describe: Callable[[], Described], device: torch.device, call: Callable[[Implementation], Result]
) -> Result:
    """Call one of them; raises `KernelError` if what was asked for by name cannot run here."""
    chosen = choice()
    wanted = preferred(device) if chosen == "auto" else IMPLEMENTATIONS[chosen]
    if wanted is ATEN:
        return call(ATEN)
    d = describe()
    kind = (wanted.name, d, device)
    reason = _refused.get(kind) or wanted.reason(d, device)
    kind_of_error: type[KernelError] = KernelError
    cause: Exception | None = None
    if reason is None:
        try:
            reason = wanted.rejection(d, device, sweep)
            if reason is None:
                with wanted.watched(d, device, sweep):
                    return call(wanted)
            kind_of_error = KernelTestError
        except KernelTestError:  # the device is lost: nothing else runs there
            raise
        except (KernelCacheError, KernelMemoryError) as error:  # of this moment: a folder may be mended, memory freed
            reason, cause, kind_of_error = str(error), error, type(error)
        except Exception as error:
            reason, cause = wanted.refusal(error, d, device), error
            if reason is None:
                raise
            _refused[kind] = reason
    if chosen != "auto":
        raise kind_of_error(
            f"{wanted.title} were requested ({VARIABLE}={chosen}), but {reason}; use 'auto' or 'aten'"
        ) from cause
    _tell(wanted.title, reason)
    return call(ATEN)


def _known(choice: str) -> str:
    if choice not in CHOICES:
        raise OptionError(f"unknown kernels {choice!r}; choose one of {', '.join(CHOICES)}")
    return choice


@lru_cache(maxsize=256)
def _tell(title: str, reason: str) -> None:
    _log.warning("the ATen lowering is used instead of %s, because %s", title, reason)
