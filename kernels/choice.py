"""Which implementation runs a call: the Triton kernels where they can, the ATen lowering elsewhere.

The environment variable ``LLCOMPILE_KERNELS`` or :func:`use` says ``auto`` (the default), ``triton`` or ``aten``. What
was asked for by name is never replaced in silence: ``triton`` raises where the kernels cannot run, with the reason.
Under ``auto`` the reason is logged once (logger ``llcompile.kernels``).
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import lru_cache

import torch
from torch import Tensor

from ..errors import KernelError, OptionError
from . import slabs
from .layout import Operands
from .step import step as aten_step
from .triton.description import Description, describe, describe_step
from .triton.limits import interpreted, unsupported

VARIABLE = "LLCOMPILE_KERNELS"
CHOICES = ("auto", "triton", "aten")
_log = logging.getLogger("llcompile.kernels")
_chosen: ContextVar[str | None] = ContextVar("llcompile_kernels", default=None)


@contextlib.contextmanager
def use(choice: str) -> Iterator[None]:
    """Run calls inside by ``choice``; raises :class:`OptionError` for an unknown one."""
    token = _chosen.set(_known(choice))
    try:
        yield
    finally:
        _chosen.reset(token)


def choice() -> str:
    """What is chosen now."""
    return _chosen.get() or _known(os.environ.get(VARIABLE) or "auto")


def by_triton(x: Operands, final_state: bool) -> bool:
    """Whether the Triton kernels run this call; raises :class:`KernelError` if they must and cannot."""
    return _can(lambda: describe(x, final_state), x.v.device)


def _can(description: Callable[[], Description], device: torch.device) -> bool:
    chosen = choice()
    if chosen == "aten" or (chosen == "auto" and device.type != "cuda"):
        return False
    reason = unsupported(description(), device)
    if reason is None:
        return True
    if chosen == "triton":
        raise KernelError(f"Triton kernels were asked for ({VARIABLE}=triton), but {reason}; use 'auto' or 'aten'")
    _tell(reason)
    return False


def forward(x: Operands, scale: float, return_final_state: bool) -> tuple[Tensor, Tensor]:
    """As :func:`.engine.forward`, by the implementation that is chosen."""
    if not by_triton(x, return_final_state):
        return slabs.forward(x, scale, return_final_state)
    from .triton import engine

    with _on_device(x.v):
        return engine.forward(x, scale, return_final_state)


def backward(x: Operands, scale: float, grad_o: Tensor, grad_state: Tensor | None) -> list[Tensor | None]:
    """As :func:`.engine.backward`, by the implementation that is chosen."""
    if not by_triton(x, grad_state is not None):
        return slabs.backward(x, scale, grad_o, grad_state)
    from .triton import engine

    with _on_device(x.v):
        return engine.backward(x, scale, grad_o, grad_state)


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
    """As :func:`.step.step`, by the implementation that is chosen."""
    if not (q.shape[1] and _can(lambda: describe_step(q, v, w, log_decay, beta), v.device)):
        return aten_step(q, k, v, w, state, log_decay, beta, scale)
    from .triton import step as kernels

    with _on_device(v):
        return kernels.step(q, k, v, w, state, log_decay, beta, scale)


def _on_device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which must be that of the operands."""
    return contextlib.nullcontext() if interpreted() or x.device.type != "cuda" else torch.cuda.device(x.device)


def _known(choice: str) -> str:
    if choice not in CHOICES:
        raise OptionError(f"kernels {choice!r} are unknown; choose one of {', '.join(CHOICES)}")
    return choice


@lru_cache(maxsize=256)
def _tell(reason: str) -> None:
    _log.info("calls run by the ATen lowering, because %s", reason)
