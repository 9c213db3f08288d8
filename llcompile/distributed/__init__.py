"""Log-linear attention over many processes: sequences that are spread over them (context parallel)."""

from __future__ import annotations

from llcompile.distributed.context import context_parallel, loglinear_attention
from llcompile.distributed.messages import Traffic

__all__ = ["Traffic", "context_parallel", "loglinear_attention"]
