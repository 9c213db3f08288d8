"""What is sent: one message per process and pass, of one size for all, and how much that was."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from llcompile.distributed.collectives import gather
from llcompile.distributed.cut import Cut
from llcompile.distributed.shard import Summary


@dataclass
class Traffic:
    """What this process has put into collectives, in bytes, and how many of them it took part in.

    `summaries` are gathered on the way forward, `gradients` of them are sent back to those they came from, `states`
    are final states and their gradients, `halos` the last tokens of shards, which the convolution of the next one
    reads, and their gradients. Agreeing on the cut takes 14 numbers a call besides.
    """

    summaries: int = 0
    gradients: int = 0
    states: int = 0
    halos: int = 0
    collectives: int = 0

    def add(self, kind: str, x: Tensor) -> None:
        """Count `x` as sent."""
        setattr(self, kind, getattr(self, kind) + x.numel() * x.element_size())
        self.collectives += 1


class Messages:
    """The collectives of one call over a group.

    Args:
        group: the processes.
        cut: their shards.
        p: the shape of a transition.
        states: the shape `[B, H, n, K, V]` of states; n is that of the shard with the most buckets.
        traffic: where to count.
    """

    def __init__(self, group: dist.ProcessGroup, cut: Cut, p: torch.Size, states: torch.Size, traffic: Traffic) -> None:
        self.group, self.cut, self.traffic, self.p = group, cut, traffic, p
        most = max(len(cut.slots(rank)) for rank in range(cut.ranks))
        self.states = (*states[:2], most, *states[3:])

    def gather(self, own: Summary) -> Tensor:
        """The messages of all processes, `[ranks, n]`."""
        message = self.written(own)
        self.traffic.add("summaries", message)
        return gather(message, self.group)

    def give_back(self, grad: Tensor) -> Tensor:
        """The gradient of this process's message from that of `gather`'s result: the sum over all readers, in order."""
        grad = grad.contiguous()
        self.traffic.add("gradients", grad)
        found = torch.empty_like(grad)
        dist.all_to_all_single(found, grad, group=self.group)
        return found.sum(0)

    def written(self, own: Summary) -> Tensor:
        """A summary as a message `[n]`, padded with zeros."""
        missing = self.states[2] - own.states.shape[2]
        states = torch.cat([own.states, own.states.new_zeros(*self.states[:2], missing, *self.states[3:])], 2)
        return torch.cat([own.p.flatten(), states.flatten()])

    def read(self, gathered: Tensor) -> list[Summary]:
        """The summaries of the shards before this one."""
        return [self._read(gathered[rank], len(self.cut.slots(rank))) for rank in range(self.cut.rank)]

    def _read(self, message: Tensor, count: int) -> Summary:
        p, states = message.split([self.p.numel(), message.numel() - self.p.numel()])
        return Summary(p.view(self.p), states.view(self.states)[:, :, :count])
