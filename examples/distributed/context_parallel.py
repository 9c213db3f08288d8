"""Spread one sequence over two processes, and compare with one process that has all of it.

torchrun --nproc-per-node 2 examples/distributed/context_parallel.py
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from llcompile.distributed import context_parallel, loglinear_attention
from llcompile.ops import loglinear_attention as on_one_process

LENGTHS = (40, 24)  # tokens of each process


def main() -> None:
    """Run the operator forward and backward, as one call and under a context."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)  # the same numbers on both; a real program loads its own shard only
    q, k, v = (torch.randn(1, sum(LENGTHS), 2, 8) for _ in range(3))
    k = torch.nn.functional.normalize(k, dim=-1)
    decay, beta = -torch.rand(1, sum(LENGTHS), 2), torch.rand(1, sum(LENGTHS), 2)
    weights = torch.rand(1, sum(LENGTHS), 2, 7)
    whole, _ = on_one_process(q, k, v, weights, decay, beta)

    first = sum(LENGTHS[:rank])
    mine = slice(first, first + LENGTHS[rank])
    shard = [x[:, mine] for x in (q, k, v, weights, decay, beta)]
    shard[2].requires_grad_()
    o, _ = loglinear_attention(*shard)
    with context_parallel() as traffic:  # the same for a compiled model: its first call belongs inside
        again, _ = on_one_process(*shard)
    again.square().mean().backward()

    worst = torch.stack([(x - whole[:, mine]).abs().max() for x in (o, again)]).max().detach()
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    assert worst < 1e-4, f"the processes' outputs differ from those of one process by {worst:.1e}"
    if rank == 0:
        print(f"largest difference {worst:.1e}; sent {traffic.summaries} bytes of summaries, in the forward and the")
        print(f"backward pass together, and {traffic.gradients} bytes of their gradients")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
