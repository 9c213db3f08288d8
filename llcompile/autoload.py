"""What `import torch` runs when llcompile is installed: it makes ``TORCH_LOGS=loglinear`` a known name.

Tiny on purpose, for every program of the environment runs it: no import beyond what torch has already loaded, and
nothing that may fail. Torch reads TORCH_LOGS after this, so the name must exist by then.
"""

from __future__ import annotations

LOG_NAME = "loglinear"
LOGGER = "llcompile"


def register() -> None:
    """Register the log name. May be called again: the backend does, for TORCH_DEVICE_BACKEND_AUTOLOAD=0."""
    try:
        from torch._logging._internal import log_registry, register_log

        if not log_registry.is_log(LOG_NAME):
            register_log(LOG_NAME, LOGGER)
    except Exception:
        # Private names of torch, which another version may lack. A lost log name must not cost anybody their torch.
        return
