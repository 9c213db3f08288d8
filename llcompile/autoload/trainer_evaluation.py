"""transformers' Trainer: it evaluates the uncompiled model during training, where level weights have no effect.

For other backends that only costs time. With `torch_compile_backend="loglinear"` the model is compiled in place for as
long as an evaluation or prediction runs, so that what is measured is what is trained.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

MODULE = "transformers.trainer"
_BACKEND = "loglinear"


@functools.cache
def install(module: ModuleType) -> None:
    """Wraps the loop that evaluates and predicts, once."""
    trainer: Any = module.Trainer
    loop = trainer.evaluation_loop

    @functools.wraps(loop)
    def evaluation_loop(self: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(self.args, "torch_compile_backend", None) != _BACKEND:
            return loop(self, *args, **kwargs)
        with _compiled(self.model, getattr(self.args, "torch_compile_mode", None)):
            return loop(self, *args, **kwargs)

    trainer.evaluation_loop = evaluation_loop


@contextmanager
def _compiled(model: Any, mode: str | None) -> Iterator[None]:
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        yield  # it is compiled already, by the user or by a Trainer that evaluates before it trains
        return
    model.compile(backend=_BACKEND, mode=mode)  # Dynamo keeps the graphs of earlier times
    try:
        yield
    finally:
        model._compiled_call_impl = None
