"""What `identify` says about a module: the module is traced by Dynamo and looked at, nothing more."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import fx, nn

from llcompile.passes.identify import identify
from llcompile.passes.session import Session, Settings
from llcompile.patterns.records import Untouched
from llcompile.patterns.structure.record import record

UNNAMED = "unnamed time mixing"


def _unused(*_: Any, **__: Any) -> Any:
    raise AssertionError("identify attaches nothing")


SETTINGS = Settings(
    choose=lambda *_: ("linear", ""),
    kind="linear",
    levels=8,
    features=8,
    make=_unused,
    shard=_unused,
    find=_unused,
    held=_unused,
    path=_unused,
    attach=_unused,
    function=_unused,
)


class Watch:
    """A backend that runs `identify` on each graph and keeps what it said, how long it took and how much it read."""

    def __init__(self) -> None:
        self.records: list[Untouched] = []
        self.seconds = 0.0
        self.nodes = 0

    def __call__(self, module: fx.GraphModule, inputs: list[Any]) -> Any:
        session = Session(module, SETTINGS)
        session.programs = {region: record(region) for region in session.regions}  # as recognition has done
        start = time.process_time()
        identify(session)
        self.seconds += time.process_time() - start
        self.nodes += len(module.graph.nodes)
        self.records.extend(session.untouched)
        return module.forward


def watched(module: nn.Module, *inputs: Any, **named: Any) -> Watch:
    """The module run once under such a backend."""
    watch = Watch()
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(module, backend=watch, dynamic=named.pop("dynamic", None))(*inputs, **named)
    return watch


def kinds(module: nn.Module, *inputs: Any, **named: Any) -> list[str]:
    """The kinds that were named, in order."""
    return [record.kind for record in watched(module, *inputs, **named).records]
