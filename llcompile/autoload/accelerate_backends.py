"""accelerate: its list of Dynamo backends is closed, so `loglinear` is added to it.

`Accelerator(dynamo_backend="loglinear")`, `TorchDynamoPlugin(backend="loglinear")`, `accelerate launch
--dynamo_backend loglinear` and `TrainingArguments(torch_compile_backend="loglinear")` of transformers all look it up
there, and refuse what it does not have.
"""

from __future__ import annotations

from enum import EnumMeta
from types import ModuleType

MODULE = "accelerate.utils.dataclasses"
_NAME = "LOGLINEAR"


def install(module: ModuleType) -> None:
    """Adds the backend to accelerate's `DynamoBackend`; may be called again."""
    backends: EnumMeta = module.DynamoBackend
    if _NAME in backends.__members__:
        return
    member = str.__new__(backends, _NAME)  # type: ignore[type-var]
    member._name_, member._value_ = _NAME, _NAME  # type: ignore[attr-defined]
    member.__objclass__ = backends  # type: ignore[attr-defined]
    member._sort_order_ = len(backends._member_names_)  # type: ignore[attr-defined]
    backends._member_names_.append(_NAME)
    backends._member_map_[_NAME] = member  # type: ignore[assignment]
    backends._value2member_map_[_NAME] = member  # type: ignore[assignment]
