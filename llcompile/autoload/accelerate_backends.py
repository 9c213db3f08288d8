"""accelerate: its list of Dynamo backends is closed, so `loglinear` is added to it.

`Accelerator(dynamo_backend="loglinear")`, `TorchDynamoPlugin(backend="loglinear")`, `accelerate launch
--dynamo_backend loglinear` and `TrainingArguments(torch_compile_backend="loglinear")` of transformers all look it up
there, and refuse what it does not have.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

MODULE = "accelerate.utils.dataclasses"
_NAME = "LOGLINEAR"


def install(module: ModuleType) -> None:
    """Adds the backend to accelerate's `DynamoBackend`; may be called again."""
    backends: Any = module.DynamoBackend
    if _NAME in backends.__members__:
        return
    member: Any = str.__new__(backends, _NAME)
    member._name_, member._value_ = _NAME, _NAME
    member.__objclass__ = backends
    member._sort_order_ = len(backends._member_names_)
    backends._member_names_.append(_NAME)
    backends._member_map_[_NAME] = member
    backends._value2member_map_[_NAME] = member
