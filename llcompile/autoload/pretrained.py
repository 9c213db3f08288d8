"""transformers: config.json says which level weights a checkpoint has, and `from_pretrained` makes a place for them.

`save_pretrained` writes the section `loglinear` (see `checkpoint.section`). A model whose configuration has one gets
its level weights at the end of its `__init__`, before any weights are loaded; so `AutoModel` and `pipeline` do, too.
The file of an adapter (`load_adapter`) tells of level weights by their descriptors.
"""

from __future__ import annotations

import functools
import inspect
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
    """Wraps four methods of `PreTrainedModel`; nothing is loaded or changed for models without level weights."""
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


def _load_adapter(original: Any) -> Any:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind_partial(self, *args, **kwargs).arguments
        tensors = given.get("adapter_state_dict") or _descriptors(given.get("peft_model_id"), given.get("kwargs", {}))
        if any(SECTION in key for key in tensors):
            from llcompile.weights.adapter_files import make_room

            make_room(self, tensors)
        return original(self, *args, **kwargs)

    return load_adapter


def _descriptors(source: Any, asked: dict[str, Any]) -> dict[str, Any]:
    """The names of the level weights' tensors in an adapter's file, with the descriptors among them; {} if it cannot
    be found, which is for transformers to say."""
    from transformers.utils import cached_file

    where = {name: asked[name] for name in ("cache_dir", "revision", "subfolder", "token") if name in asked}
    kinds = ("gated_repo", "missing_entries", "connection_errors")
    quiet = {f"_raise_exceptions_for_{kind}": False for kind in kinds}
    path = None if source is None else cached_file(source, "adapter_model.safetensors", **where, **quiet)
    if path is None:
        return {}
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if SECTION in name]  # noqa: SIM118
        return {name: file.get_tensor(name) if name.endswith("descriptor") else None for name in names}


_METHODS = {
    "load_adapter": _load_adapter,
    "post_init": _post_init,
    "initialize_weights": _initialize_weights,
    "save_pretrained": _save_pretrained,
}
