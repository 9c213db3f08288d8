"""Names of modules and tensors as they are inside of what wraps the model, or a part of it."""

from __future__ import annotations

# Where torch.compile holds the module that it wraps, and where DDP does.
COMPILED, PARALLEL = "_orig_mod", "module"


def inner_name(name: str, *wrappers: str) -> str:
    """`name` without the parts that are `wrappers`."""
    return ".".join(part for part in name.split(".") if part not in wrappers)
