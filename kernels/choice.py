"""Which implementation runs a call: the Triton kernels where they can, the ATen lowering elsewhere.

The environment variable `LLCOMPILE_KERNELS` or `use` says `auto` (the default), `triton` or `aten`. What
was asked for by name is never replaced in silence: `triton` raises where the kernels cannot run, with the reason.
Under `auto` the ATen lowering runs instead, and a warning gives the reason once (logger `llcompile.kernels`).
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

from llcompile.errors import KernelCacheError, KernelError, OptionError
from llcompile.kernels.aten import padded
from llcompile.kernels.aten.token import step as aten_step
from llcompile.kernels.description import Description, describe, describe_step
from llcompile.kernels.operands import Operands
from llcompile.kernels.triton.limits import interpreted, refusals, unsupported

VARIABLE = "LLCOMPILE_KERNELS"
CHOICES = ("auto", "triton", "aten")
Result = TypeVar("Result")
_log = logging.getLogger("llcompile.kernels")
_chosen: ContextVar[str | None] = ContextVar("llcompile_kernels", default=None)

# Why Triton could not make the kernels of a description for a device, where that showed only when they were to run.
_refused: dict[tuple[Description, torch.device], str] = {}


@contextlib.contextmanager
def use(choice: str) -> Iterator[None]:
    """Run calls inside by `choice`; raises `OptionError` for an unknown one."""
    token = _chosen.set(_known(choice))
    try:
        yield
    finally:
        _chosen.reset(token)


def choice() -> str:
    """What is chosen now."""
    return _chosen.get() or _known(os.environ.get(VARIABLE) or "auto")


def forward(x: Operands, scale: float, return_final_state: bool) -> tuple[Tensor, Tensor]:
    """As `aten.sequence.forward`, by the implementation that is chosen."""

    def kernels() -> tuple[Tensor, Tensor]:
        from llcompile.kernels.triton import engine

        return engine.forward(x, scale, return_final_state)

    def lowering() -> tuple[Tensor, Tensor]:
        return padded.forward(x, scale, return_final_state)

    return _chosen_of(lambda: describe(x, return_final_state), x.v, kernels, lowering)


def backward(x: Operands, scale: float, grad_o: Tensor, grad_state: Tensor | None) -> list[Tensor | None]:
    """As `aten.sequence.backward`, by the implementation that is chosen."""

    def kernels() -> list[Tensor | None]:
        from llcompile.kernels.triton import engine

        return engine.backward(x, scale, grad_o, grad_state)

    def lowering() -> list[Tensor | None]:
        return padded.backward(x, scale, grad_o, grad_state)

    return _chosen_of(lambda: describe(x, grad_state is not None), x.v, kernels, lowering)


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor | None,
    state: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """As `aten.token.step`, by the implementation that is chosen."""
    operands = (q, k, v, w, state, log_decay, beta, scale)

    def kernels() -> tuple[Tensor, Tensor]:
        from llcompile.kernels.triton import step as kernels

        return kernels.step(*operands)

    def lowering() -> tuple[Tensor, Tensor]:
        return aten_step(*operands)

    if not q.shape[1]:  # no heads: nothing to describe
        return lowering()
    return _chosen_of(lambda: describe_step(q, v, w, log_decay, beta), v, kernels, lowering)


def _chosen_of(
    description: Callable[[], Description], v: Tensor, kernels: Callable[[], Result], lowering: Callable[[], Result]
) -> Result:
    """Run one of the two; raises `KernelError` if it must be the kernels and they cannot run here."""
    chosen = choice()
    if chosen == "aten" or (chosen == "auto" and not _prefers_kernels(v.device)):
        return lowering()
    d = description()
    reason = _refused.get((d, v.device)) or unsupported(d, v.device)
    cause: BaseException | None = None
    if reason is None:
        try:
            with _on_device(v):
                return kernels()
        except KernelCacheError as error:  # of this moment: the folder may be mended
            reason, cause = str(error), error
        except refusals() as error:  # of this description on this device: the next call need not try
            cause = error
            reason = _refused[d, v.device] = f"Triton cannot compile them for {d} on {v.device}: {_line(error)}"
    if chosen == "triton":
        if isinstance(cause, KernelCacheError):
            raise cause
        raise KernelError(
            f"Triton kernels were requested ({VARIABLE}=triton), but {reason}; use 'auto' or 'aten'"
        ) from cause
    _tell(reason)
    return lowering()


def _line(error: BaseException) -> str:
    """What an error says, in a line: a compiler's listing stands in the exception itself."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[-1][:200]}" if text else type(error).__name__


def _prefers_kernels(device: torch.device) -> bool:
    """Whether `auto` prefers the kernels: on CUDA and ROCm, which torch calls by one name."""
    return device.type == "cuda"


def _on_device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which must be that of the operands."""
    return contextlib.nullcontext() if interpreted() or x.device.type != "cuda" else torch.cuda.device(x.device)


def _known(choice: str) -> str:
    if choice not in CHOICES:
        raise OptionError(f"unknown kernels {choice!r}; choose one of {', '.join(CHOICES)}")
    return choice


@lru_cache(maxsize=256)
def _tell(reason: str) -> None:
    _log.warning("the ATen lowering is used instead of Triton kernels, because %s", reason)
