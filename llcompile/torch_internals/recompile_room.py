"""Room for models that Dynamo compiles in pieces, or for many kinds of calls: its limit counts for each module.

Dynamo counts the graphs of a function for all modules that share it. A model whose graph breaks in every layer (and one
whose layers are compiled one by one) meets `torch._dynamo.config.recompile_limit` (8) after a few layers; from there on
the library's own code runs, which ignores level weights and cannot read a state with levels. A decorator around
`forward` is one function for all models of a library, and a graph of its own for each set of keywords.
"""

from __future__ import annotations

import logging
from weakref import WeakSet

import torch
from torch import nn

# With and without a cache, prefill and decoding, padded and not, with gradients and without: kinds of calls multiply.
_KINDS_OF_CALLS = 4

log = logging.getLogger("llcompile")

_modules: WeakSet[nn.Module] = WeakSet()
# The limit as the user left it, and the one that was set here.
_given = _raised = 0


def make_room(module: nn.Module | None) -> None:
    """Notes a module whose frame is being compiled, and allows a multiple of the graphs that the user does, for each.

    Only ever raises the limits in force; a `recompile_limit` of a torch.compile call itself stays as it is.
    """
    global _given, _raised
    if module is None or module in _modules:
        return
    _modules.add(module)
    config = torch._dynamo.config
    if config.recompile_limit != _raised:
        _given = config.recompile_limit
    _raised = _given * _KINDS_OF_CALLS * len(_modules)
    if config.recompile_limit < _raised:
        log.info(
            "torch._dynamo.config.recompile_limit is now %d, %d for each module", _raised, _raised // len(_modules)
        )
        config.recompile_limit = _raised
        config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, _raised)
