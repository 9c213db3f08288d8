"""The public face of context parallel: a context, and the operator as one call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from llcompile import ops
from llcompile.distributed.messages import Traffic
from llcompile.distributed.sequence import OverProcesses
from llcompile.errors import DistributedError
from llcompile.kernels import spread


@contextlib.contextmanager
def context_parallel(group: dist.ProcessGroup | DeviceMesh | None = None) -> Iterator[Traffic]:
    """Run the operator on sequences that are spread over processes: each passes its shard `[B, T_r, ...]` of them.

    Shards are in the order of the ranks and may differ in length. Results are those of one process that has the whole
    sequence. What is sent for a call is one transition and one state for each set bit of a shard's end, whatever T.
    A backward pass may run outside of the context.

    Args:
        group: the processes, or a mesh of one dimension of them; None is all of them.

    Yields:
        What this process has sent so far.

    Raises:
        DistributedError: there is no such group; inside, on all processes, where a call cannot be spread.
    """
    over = OverProcesses(_group(group))
    with spread.run_by(over):
        yield over.traffic


def loglinear_attention(
    *operands: Any, group: dist.ProcessGroup | DeviceMesh | None = None, **named: Any
) -> tuple[Tensor, Tensor | None]:
    """`llcompile.ops.loglinear_attention` on a sequence that is spread over processes.

    Each process passes its shard of the operands that have an axis T, the first one the initial state. The final state
    is that of the whole sequence, on every process; its gradient is the sum over them.

    Raises:
        OperandError, StateError: as without processes.
        DistributedError: the processes' operands do not belong together, or there is no such group.
    """
    with context_parallel(group):
        return ops.loglinear_attention(*operands, **named)


def _group(group: dist.ProcessGroup | DeviceMesh | None) -> dist.ProcessGroup:
    if not dist.is_available() or not dist.is_initialized():
        raise DistributedError(
            "context_parallel needs processes, but torch.distributed is not initialised; start with torchrun and call "
            "torch.distributed.init_process_group first"
        )
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise DistributedError(
                f"context_parallel needs a mesh of one dimension, got {group.ndim} ({group.mesh_dim_names}); pass the "
                "part over which the sequence is cut, mesh['cp'] for example"
            )
        return group.get_group()
    if group is None:
        return dist.group.WORLD  # type: ignore[return-value]
    return group
