"""Split a converted model over two processes, train a step with micro-batches, and compare with one process.

torchrun --nproc-per-node 2 examples/distributed/pipeline_parallel.py
"""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

import llcompile

WIDTH, HEADS, VOCABULARY, MICRO_BATCHES = 16, 2, 32, 4
OPTIONS = {"inner": "eager"}  # leave it out for Inductor; eager starts at once


class Mixer(nn.Module):
    """Causal linear attention with its projections and its residual."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, T, D] to [B, T, D]."""
        q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))  # [B, H, T, K]
        scores = (q @ k.transpose(-1, -2)).tril() / x.shape[1]
        return x + (scores @ v).transpose(1, 2).flatten(-2)


def loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Next-token cross-entropy."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def main() -> None:
    """Train one step on two stages."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)  # the same numbers on both; a real program builds its own stage only
    tokens = torch.randint(VOCABULARY, (2 * MICRO_BATCHES, 24))
    model = nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), Mixer(), Mixer(), nn.Linear(WIDTH, VOCABULARY))

    llcompile.convert(model, tokens[:2])  # before it is split: each stage keeps the level weights of its mixers
    for weights in llcompile.level_parameters(model):
        nn.init.normal_(weights, std=0.1)  # stands for a training, so that they have an effect
    alone = copy.deepcopy(model)

    part = model[:2] if rank == 0 else model[2:]
    part.compile(backend="loglinear", options=OPTIONS)
    stage = PipelineStage(part, rank, 2, torch.device("cpu"))
    schedule = Schedule1F1B(stage, MICRO_BATCHES, loss_fn=loss)
    losses: list[Tensor] = []
    if rank == 0:
        schedule.step(tokens)
    else:
        schedule.step(target=tokens, losses=losses)

    expected = loss(torch.compile(alone, backend="loglinear", options=OPTIONS)(tokens), tokens)
    expected.backward()
    same = dict((alone[:2] if rank == 0 else alone[2:]).named_parameters())
    worst = torch.stack([(p.grad - same[name].grad).abs().max() for name, p in part.named_parameters()]).max()
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    assert worst < 1e-5, f"gradients differ from those of one process by {worst:.1e}"
    assert all(p.grad.abs().max() > 0 for p in llcompile.level_parameters(part)), "level weights have no gradient"
    if rank == 1:
        print(f"loss {torch.stack(losses).mean():.4f}, on one process {expected:.4f}")
        print(f"largest difference of a gradient {worst:.1e}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
