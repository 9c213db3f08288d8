"""PEFT: the file of an adapter that was trained with level weights opens on a base model that has none.

PEFT itself would drop them, and the adapter would run as on the linear model.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

MODULE = "peft.peft_model"
_NAME = "set_peft_model_state_dict"
# The modules that have the function under its name by the time that a user calls it.
_HOLDERS = (MODULE, "peft.utils.save_and_load", "peft.utils", "peft", "peft.functional")


def install(module: ModuleType) -> None:
    """Wraps the function that all of PEFT's ways to load an adapter end in, once."""
    original = getattr(module, _NAME)
    if getattr(original, "_llcompile", False):
        return
    wrapped = _wrapped(original)
    for name in _HOLDERS:
        if getattr(sys.modules.get(name), _NAME, None) is original:
            setattr(sys.modules[name], _NAME, wrapped)


def _wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def set_peft_model_state_dict(
        model: Any, peft_model_state_dict: Any, adapter_name: str = "default", *args: Any, **kwargs: Any
    ) -> Any:
        if any("loglinear" in key for key in peft_model_state_dict):
            from llcompile.weights.adapter_files import make_room_in_adapter

            make_room_in_adapter(model, peft_model_state_dict, adapter_name)
        return original(model, peft_model_state_dict, adapter_name, *args, **kwargs)

    set_peft_model_state_dict._llcompile = True  # type: ignore[attr-defined]
    return set_peft_model_state_dict
