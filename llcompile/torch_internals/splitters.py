"""Splitters: what cuts Dynamo's graph into pieces before any backend sees it.

DistributedDataParallel's optimizer makes a piece of each bucket of gradients. A piece knows neither the inputs of the
program nor who owns its level weights; so the whole graph is rewritten first, and the pieces are pieces of that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import fx

from llcompile.torch_internals.inputs import graph_inputs

Compiled = Callable[..., Any]
# (graph, backend) -> what is to be done with the compiled whole; None where the backend is not ours.
Rewrite = Callable[[fx.GraphModule, Any], "Callable[[Compiled], Compiled] | None"]


def install(rewrite: Rewrite) -> None:
    """Has DDP's optimizer split graphs of ours after they are rewritten."""
    try:
        from torch._dynamo.backends.distributed import DDPOptimizer
    except ImportError:  # a torch without torch.distributed
        return
    original = DDPOptimizer.compile_fn

    @functools.wraps(original)
    def compile_fn(self: Any, module: fx.GraphModule, inputs: list[Any], **configs: Any) -> Compiled:
        finish = rewrite(module, self.backend_compile_fn)
        if finish is None:
            return original(self, module, inputs, **configs)
        return finish(original(self, module, graph_inputs(module.graph), **configs))

    DDPOptimizer.compile_fn = compile_fn  # type: ignore[method-assign, assignment]
