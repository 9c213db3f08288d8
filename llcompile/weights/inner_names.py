"""Names of modules and tensors as they are inside of what wraps the model, or a part of it."""

from __future__ import annotations

from torch import nn

# Where torch.compile holds the module that it wraps, and where DDP does.
COMPILED, PARALLEL = "_orig_mod", "module"


def inner_name(name: str, *wrappers: str) -> str:
    """`name` without the parts that are `wrappers`."""
    return ".".join(part for part in name.split(".") if part not in wrappers)


def inner_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by the names that files have: those that torch.compile holds stand for its wrappers, which come first."""
    return {inner_name(name, COMPILED): module for name, module in model.named_modules()}
