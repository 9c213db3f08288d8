"""transformers: config.json says which level weights a checkpoint has, and `from_pretrained` makes a place for them.

`save_pretrained` writes the section `loglinear` (see `checkpoint.section`). A model whose configuration has one gets
its level weights at the end of its `__init__`, before any weights are loaded; so `AutoModel` and `pipeline` do, too.
"""

from __future__ import annotations

import functools
import sys
import weakref
from types import ModuleType
from typing import Any

from torch import nn

from llcompile.weights import SECTION

MODULE = "transformers.modeling_utils"

# Level weights that were made for a checkpoint and have not met it yet.
_waiting: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def install(module: ModuleType) -> None:
    """Wraps three methods of `PreTrainedModel`; nothing is loaded or changed for models without level weights."""
    model = module.PreTrainedModel
    if getattr(model.post_init, "_llcompile", False):
        return
    for name, wrap in _METHODS.items():
        wrapped = wrap(getattr(model, name))
        wrapped._llcompile = True
        setattr(model, name, wrapped)


def _post_init(original: Any) -> Any:
    @functools.wraps(original)
    def post_init(self: Any) -> Any:
        section = vars(self.config).get(SECTION)
        if section:
            from llcompile.weights.checkpoint import restore

            _waiting.update(restore(self, section, prefix=f"{self.base_model_prefix}."))
        return original(self)

    return post_init


def _initialize_weights(original: Any) -> Any:
    @functools.wraps(original)
    def initialize_weights(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        for weights in [m for m in self.modules() if m in _waiting] if _waiting else ():
            _start_what_is_missing(weights)
        return result

    return initialize_weights


def _start_what_is_missing(weights: Any) -> None:
    """What no checkpoint has filled is uninitialised memory; transformers has marked the rest."""
    tensors = [tensor for _, tensor in weights.tensors()]
    if any(tensor.is_meta for tensor in tensors):
        return
    _waiting.discard(weights)
    if not all(getattr(tensor, "_is_hf_initialized", False) for tensor in tensors):
        weights.reset_parameters()


def _save_pretrained(original: Any) -> Any:
    @functools.wraps(original)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "llcompile.weights.attachment" not in sys.modules:  # then nothing has level weights
            return original(self, *args, **kwargs)
        from llcompile.weights.checkpoint import section

        held = vars(self.config)
        before = held.pop(SECTION, None)
        now = section(self)
        if now is not None:
            held[SECTION] = now
        try:
            return original(self, *args, **kwargs)
        finally:
            held.pop(SECTION, None)
            if before is not None:
                held[SECTION] = before

    return save_pretrained


_METHODS = {
    "post_init": _post_init,
    "initialize_weights": _initialize_weights,
    "save_pretrained": _save_pretrained,
}
