"""What llcompile tells torch's logs (TORCH_LOGS) and traces (TORCH_TRACE, which tlparse reads).

| name | what it shows |
|---|---|
| ``TORCH_LOGS=loglinear`` | decisions: the report on each graph |
| ``TORCH_LOGS=+loglinear`` | each pass with its count and time, and each cut that was tried |
| ``TORCH_LOGS=loglinear_kernels`` | the source of each generated kernel |
| ``TORCH_TRACE=folder`` | the report, the rewritten graph and the kernels, as artifacts |
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from torch._logging._internal import getArtifactLogger, trace_structured

from llcompile import autoload


def artifact(name: str, payload: Callable[[], str], encoding: str = "string") -> None:
    """Adds a file to the structured trace of this process, where one is written."""
    trace_structured(
        "artifact", lambda: {"name": name, "encoding": encoding}, payload_fn=payload, expect_trace_id=False
    )


def kernel_log() -> logging.Logger:
    """The logger behind ``TORCH_LOGS=loglinear_kernels``; its messages have level DEBUG."""
    autoload.register()
    try:
        return getArtifactLogger("llcompile.kernels", autoload.KERNEL_LOG_NAME)
    except ValueError:  # this torch does not let names be registered
        return logging.getLogger("llcompile.kernels.sources")
