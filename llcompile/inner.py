"""The inner compilers: what a rewritten graph is handed to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from llcompile.options import Options
from llcompile.sources import source_tag


def compile_graph(module: fx.GraphModule, inputs: list[Any], options: Options, mode: str | None) -> Callable[..., Any]:
    """The compiled form of a Dynamo graph; `mode` and `options.inductor` only speak to Inductor."""
    # The operator's backward and the rewrite rules are no part of the graph that a compile cache hashes.
    tag = f"{torch.compiler.config.cache_key_tag}:llcompile:{source_tag()}:{options}"
    with torch.compiler.config.patch(cache_key_tag=tag):  # type: ignore[attr-defined]
        return _INNER[options.inner](module, inputs, options, mode)


def _inductor(module: fx.GraphModule, inputs: list[Any], options: Options, mode: str | None) -> Callable[..., Any]:
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = {**(list_mode_options(mode) if mode and mode != "default" else {}), **options.inductor}
    return compile_fx(module, inputs, config_patches=patches)  # type: ignore[return-value]


def _registered(name: str) -> Callable[..., Callable[..., Any]]:
    def compile_with(module: fx.GraphModule, inputs: list[Any], options: Options, mode: str | None) -> Any:
        from torch._dynamo.backends.registry import lookup_backend

        return lookup_backend(name)(module, inputs)

    return compile_with


_INNER: dict[str, Callable[..., Callable[..., Any]]] = {
    "inductor": _inductor,
    "aot_eager": _registered("aot_eager"),
    "eager": _registered("eager"),
}
