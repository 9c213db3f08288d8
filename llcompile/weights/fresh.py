"""Level weights that a compilation attaches stay if it succeeds; one that fails or is interrupted leaves none."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from llcompile.torch_internals.trace import Restart, at_compile_end
from llcompile.weights import attachment


class _Pending(threading.local):
    """What the compilation under way in this thread has attached; it is traced once more afterwards."""

    def __init__(self) -> None:
        self.attached: list[tuple[nn.Module, str]] = []


_pending = _Pending()


def attach(owner: nn.Module, name: str, weights: nn.Module) -> None:
    """As `attachment.attach`, until the compilation has come to its end."""
    attachment.attach(owner, name, weights)
    _pending.attached.append((owner, name))
    # A trace that is interrupted does not come back to the backend.
    at_compile_end(_take_off)


@contextmanager
def kept_on_success(done: bool = True) -> Iterator[None]:
    """What is attached inside stays if nothing is raised; a restart of the trace goes on with it.

    `done` says whether success inside is that of the whole compilation.
    """
    try:
        yield
    except Restart:
        raise
    except BaseException:
        _take_off()
        raise
    if done:
        _pending.attached.clear()


def _take_off(_: Any = None) -> None:
    while _pending.attached:
        owner, name = _pending.attached.pop()
        if attachment.find(owner, name) is not None:
            attachment.detach_one(owner, name)
