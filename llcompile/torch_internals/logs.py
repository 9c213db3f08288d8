"""What llcompile tells torch's logs (TORCH_LOGS) and traces (TORCH_TRACE, which tlparse reads).

| name | what it shows |
|---|---|
| `TORCH_LOGS=loglinear` | decisions: the report on each graph |
| `TORCH_LOGS=+loglinear` | each pass with its count and time, and each cut that was tried |
| `TORCH_LOGS=loglinear_kernels` | the source of each generated kernel |
| `TORCH_TRACE=folder` | the report, the rewritten graph and the kernels, as artifacts |
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from torch._logging._internal import getArtifactLogger, log_registry, register_artifact, register_log, trace_structured

LOG_NAME = "loglinear"
KERNEL_LOG_NAME = "loglinear_kernels"
LOGGER = "llcompile"


def register() -> None:
    """Makes both names known to TORCH_LOGS, once."""
    if not log_registry.is_log(LOG_NAME):
        register_log(LOG_NAME, LOGGER)
    if not log_registry.is_artifact(KERNEL_LOG_NAME):
        register_artifact(KERNEL_LOG_NAME, "generated Triton kernels of llcompile", visible=True, off_by_default=True)


def artifact(name: str, payload: Callable[[], str], encoding: str = "string") -> None:
    """Adds a file to the structured trace of this process, where one is written."""
    trace_structured(
        "artifact", lambda: {"name": name, "encoding": encoding}, payload_fn=payload, expect_trace_id=False
    )


def kernel_log() -> logging.Logger:
    """The logger behind `TORCH_LOGS=loglinear_kernels`; its messages have level DEBUG."""
    try:
        register()
        return getArtifactLogger("llcompile.kernels", KERNEL_LOG_NAME)
    except (ValueError, AttributeError, TypeError):  # this torch does not let names be registered
        return logging.getLogger("llcompile.kernels.sources")
