"""What `import torch` runs when llcompile is installed: log names, the operators' namespace, checkpoints, exports.

`TORCH_LOGS=loglinear` works, an exported program that calls `torch.ops.llcompile.*` is loaded, `from_pretrained` of
transformers loads level weights, torch.export records converted models rewritten, accelerate knows the backend, and
DTensors know the operators.

Tiny on purpose, for every program of the environment runs it: no import beyond what torch has already loaded, and
nothing that may fail. Torch reads TORCH_LOGS after this, so the name must exist by then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def register() -> None:
    """Register all names. May be called again: llcompile does, for TORCH_DEVICE_BACKEND_AUTOLOAD=0."""
    for step in (_logs, _operators, _other_modules):
        _attempt(step)


def _attempt(step: Callable[[], None]) -> None:
    try:
        step()
    except Exception:
        # Private names of torch, which another version may lack. A lost log name must not cost anybody their torch.
        return


def _logs() -> None:
    from llcompile.torch_internals import logs

    logs.register()


def _operators() -> None:
    import torch
    from torch._ops import _OpNamespace

    class Namespace(_OpNamespace):
        """torch.ops.llcompile, which registers its operators when one of them is asked for by name."""

        __module__ = _OpNamespace.__module__  # becomes part of the operators' names

        def __getattr__(self, name: str) -> Any:
            if not name.startswith("__"):
                import llcompile.ops  # noqa: F401
            return super().__getattr__(name)

    if "llcompile" not in vars(torch.ops):
        torch.ops.llcompile = Namespace("llcompile")  # type: ignore[attr-defined]


def _other_modules() -> None:
    from llcompile.autoload import (
        accelerate_backends,
        adapter_files,
        dtensor_rules,
        pretrained,
        torch_export,
        trainer_evaluation,
    )
    from llcompile.integrations.after_import import after_import

    for hook in (pretrained, adapter_files, torch_export, accelerate_backends, trainer_evaluation, dtensor_rules):
        after_import(hook.MODULE, hook.install)
