"""Processes that work together on this machine, over gloo."""

from __future__ import annotations

import gc
import socket
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


def together(work: Callable[..., None], *args: Any, ranks: int = 2) -> None:
    """Call `work(rank, *args)` in `ranks` processes of one group; raises what one of them raises."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Their server imports torch and the libraries once for all.
    preload = ["tests.helpers.small", "torch.distributed.fsdp", "torch._dynamo", "llcompile.distributed"]
    torch.multiprocessing.set_forkserver_preload(preload)
    torch.multiprocessing.start_processes(_begin, (port, ranks, work, args), nprocs=ranks, start_method="forkserver")


def _begin(rank: int, port: int, ranks: int, work: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    address, limit = f"tcp://127.0.0.1:{port}", timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=ranks, timeout=limit)
    try:
        work(rank, *args)
    finally:
        # In this order: at the end of the process, the destructors of DDP's reducers and of gloo wait for each other.
        gc.collect()
        dist.destroy_process_group()
