"""The inner compilers: what a rewritten graph is handed to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from llcompile.torch_internals.sources import source_tag


def compile_graph(
    module: fx.GraphModule, inputs: list[Any], name: str, inductor: Mapping[str, Any], mode: str | None, tag: str
) -> Callable[..., Any]:
    """The compiled form of a Dynamo graph, by the compiler with this name.

    `mode` and `inductor` (its options) only speak to Inductor. `tag` says what else the graph was made by.
    """
    # The operator's backward and the rewrite rules are no part of the graph that a compile cache hashes.
    key = f"{torch.compiler.config.cache_key_tag}:llcompile:{source_tag()}:{tag}"
    with torch.compiler.config.patch(cache_key_tag=key):  # type: ignore[attr-defined]
        return _INNER[name](module, inputs, inductor, mode)


def _inductor(
    module: fx.GraphModule, inputs: list[Any], inductor: Mapping[str, Any], mode: str | None
) -> Callable[..., Any]:
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    patches = {**(list_mode_options(mode) if mode and mode != "default" else {}), **inductor}
    # A backward pass may be compiled as late as the first call of backward, far outside of what `compile_graph` set.
    tagged = torch.compiler.config.patch(cache_key_tag=torch.compiler.config.cache_key_tag)  # type: ignore[attr-defined]
    return compile_fx(module, inputs, inner_compile=tagged(compile_fx_inner), config_patches=patches)  # type: ignore[return-value]


def _registered(name: str) -> Callable[..., Callable[..., Any]]:
    def compile_with(module: fx.GraphModule, inputs: list[Any], inductor: Mapping[str, Any], mode: str | None) -> Any:
        from torch._dynamo.backends.registry import lookup_backend

        return lookup_backend(name)(module, inputs)

    return compile_with


_INNER: dict[str, Callable[..., Callable[..., Any]]] = {
    "inductor": _inductor,
    "aot_eager": _registered("aot_eager"),
    "eager": _registered("eager"),
}
