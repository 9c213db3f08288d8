"""One call of the operator, its sequence spread over processes: forward, and backward from the operands alone.

Forward: each process sums up its shard, all gather the summaries, each folds those before its own into the level
states at its start, and runs the operator from there. Backward does the same again and then goes the other way: the
gradient of the states at a shard's start goes through the fold to the messages, each of which returns to its sender.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from llcompile.distributed import shard
from llcompile.distributed.cut import agree
from llcompile.distributed.fold import states_at_start
from llcompile.distributed.messages import Messages, Traffic
from llcompile.kernels import choice
from llcompile.kernels.operands import DIFFERENTIABLE, Operands
from llcompile.kernels.spread import run_by
from llcompile.kernels.state import state_dtype

_INITIAL, _V = Operands._fields.index("initial_state"), Operands._fields.index("v")


class OverProcesses:
    """Runs calls of which each process of `group` holds a part of the tokens; `kernels.spread.Spread`.

    All processes must make the same calls in the same order.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.traffic = group, Traffic()

    def forward(self, x: Operands, scale: float, return_final_state: bool) -> tuple[Tensor, Tensor]:
        """Output of this process's tokens, and the state after the last token of the sequence, on all."""
        with run_by(None):
            one = _Call(x, self.group, self.traffic)
            o, state = choice.forward(one.continued, scale, return_final_state)
            if return_final_state:
                self._send_from_last(state)
        return o, state

    def backward(self, x: Operands, scale: float, grad_o: Tensor, grad_state: Tensor | None) -> list[Tensor | None]:
        """Gradients of this process's operands; that of the final state is summed over the processes."""
        with run_by(None):
            one = _Call(x, self.group, self.traffic)
            if grad_state is not None:
                grad_state = grad_state.to(state_dtype(x.v.dtype)).clone(memory_format=torch.contiguous_format)
                self.traffic.add("states", grad_state)
                dist.all_reduce(grad_state, group=self.group)
            return one.backward(scale, grad_o, grad_state if one.cut.last else None)

    def from_before(self, x: Tensor) -> Tensor:
        """What the process before this one passed here, of the same shape; zeros for the first."""
        return self._shifted(x, 1)

    def from_after(self, x: Tensor) -> Tensor:
        """What the process after this one passed here, of the same shape; zeros for the last."""
        return self._shifted(x, -1)

    def _shifted(self, x: Tensor, by: int) -> Tensor:
        x, received = x.contiguous(), torch.zeros_like(x, memory_format=torch.contiguous_format)
        rank, ranks = dist.get_rank(self.group), dist.get_world_size(self.group)
        steps = []
        if 0 <= rank + by < ranks:
            to = dist.get_global_rank(self.group, rank + by)
            steps.append(dist.P2POp(dist.isend, x, to, self.group))
            self.traffic.add("halos", x)
        if 0 <= rank - by < ranks:
            steps.append(dist.P2POp(dist.irecv, received, dist.get_global_rank(self.group, rank - by), self.group))
        for work in dist.batch_isend_irecv(steps) if steps else ():
            work.wait()
        return received

    def _send_from_last(self, state: Tensor) -> None:
        last = dist.get_world_size(self.group) - 1
        self.traffic.add("states", state if dist.get_rank(self.group) == last else state[:0])
        dist.broadcast(state, dist.get_global_rank(self.group, last), group=self.group)


class _Call:
    """One call on this process, after all processes have agreed on the cut."""

    def __init__(self, x: Operands, group: dist.ProcessGroup, traffic: Traffic) -> None:
        self.x, self.cut = x, agree(x, group)
        self.kind = shard.kind_of(x)
        self.summing = shard.call(x, self.cut)
        self.final = shard.final_state(self.summing)
        own = shard.summary(x, self.cut, self.final)
        self.messages = Messages(group, self.cut, own.p.shape, own.states.shape, traffic)
        self.gathered = self.messages.gather(own)

    @cached_property
    def continued(self) -> Operands:
        """The operands of the operator on this shard; the first one begins as it was called."""
        if self.cut.rank == 0:
            return self.x
        state = shard.packed(self.x, self._start(self.gathered), self.cut.starts[self.cut.rank])
        return self.x._replace(initial_state=state)

    def _start(self, gathered: Tensor) -> Tensor:
        return states_at_start(self.kind, self.cut, self.messages.read(gathered), shard.before(self.x, self.cut))

    def backward(self, scale: float, grad_o: Tensor, grad_state: Tensor | None) -> list[Tensor | None]:
        """Gradients of the operands."""
        found = choice.backward(self.continued, scale, grad_o, grad_state)
        of_start, found[_INITIAL] = found[_INITIAL], found[_INITIAL] if self.cut.rank == 0 else None
        of_message = self.messages.give_back(self._through_fold(of_start))
        return _summed(found, self._through_summary(of_message))

    def _through_fold(self, of_start: Tensor | None) -> Tensor:
        """The gradient of the gathered messages from that of the initial state of this process's call."""
        if self.cut.rank == 0 or of_start is None:
            return torch.zeros_like(self.gathered)
        levels = of_start[:, :, None] if self.x.level_weights is None else of_start[:, :, 1:]
        return _pulled(lambda gathered: self._start(gathered), [self.gathered], levels)[0]

    def _through_summary(self, of_message: Tensor) -> list[Tensor | None]:
        """The gradients of the operands from that of this process's message."""
        x, none = self.x, [None] * DIFFERENTIABLE
        of_decays: list[Tensor | None] = [*none]
        names = [n for n in ("log_decay", "decay_rate") if getattr(x, n) is not None]
        decays = [getattr(x, n) for n in names]

        def message(final: Tensor, *given: Tensor) -> Tensor:
            replaced = x._replace(**dict(zip(names, given, strict=True)))
            return self.messages.written(shard.summary(replaced, self.cut, final))

        of_final, *rest = _pulled(message, [self.final, *decays], of_message)
        for name, grad in zip(names, rest, strict=True):
            of_decays[Operands._fields.index(name)] = grad
        nothing = self.summing.v.new_zeros(self.summing.v.shape)
        found = choice.backward(self.summing, 1.0, nothing, of_final)
        found[_V] = None if found[_V] is None else found[_V][..., : x.v.shape[3]]  # type: ignore[index]
        found[_INITIAL] = self._through_before(found[_INITIAL])
        return _summed(found, of_decays)

    def _through_before(self, of_state: Tensor | None) -> Tensor | None:
        """The gradient of the caller's initial state from that of the initial state of the call that sums up."""
        state = self.x.initial_state
        if state is None or of_state is None:
            return None
        levels = of_state[:, :, None] if self.x.level_weights is None else of_state[:, :, 1:]
        of_levels = levels[..., : self.x.v.shape[3]]
        return _pulled(lambda s: shard.before(self.x._replace(initial_state=s), self.cut), [state], of_levels)[0]


def _summed(one: Sequence[Tensor | None], other: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients of the same operands, added."""
    return [a if b is None else b if a is None else a + b for a, b in zip(one, other, strict=True)]


def _pulled(function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    """Gradients of `inputs`, zeros where there is none; an operator runs below autograd, and this lifts it above."""
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        result = function(*leaves)
        if not result.requires_grad:
            return [torch.zeros_like(x) for x in leaves]
        found = torch.autograd.grad(result, leaves, grad.to(result.dtype), allow_unused=True)
    return [torch.zeros_like(x) if d is None else d for x, d in zip(leaves, found, strict=True)]
