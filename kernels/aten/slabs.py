"""The operator on a CPU, a few heads at a time.

Heads (and batch rows) are independent, so a call can be cut into slabs that run one after the other. The temporaries of
one slab then fit a cache, or at least are memory that the previous slab has just given back, and peak memory is that of
one slab. The number of slabs depends on batch and heads, never on the length. On an accelerator all heads run at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from llcompile.kernels.aten import sequence
from llcompile.kernels.operands import Operands
from llcompile.kernels.state import state_dtype

# Elements of q or v in one slab: enough to share a slab among threads, few enough for its temporaries to be small.
_SLAB = 1 << 18


class Slab(NamedTuple):
    """A range of batch rows, of groups of q and k, and of heads."""

    rows: slice
    groups: slice
    heads: slice

    def of(self, x: Operands) -> Operands:
        """The slab's part of the operands, as views."""
        return Operands(
            x.q[self.rows, :, self.groups],
            x.k[self.rows, :, self.groups],
            x.v[self.rows, :, self.heads],
            self.per_head(x.level_weights),
            self.per_head(x.log_decay),
            self.per_head(x.beta),
            None if x.initial_state is None else x.initial_state[self.rows, self.heads],
            None if x.lengths is None else x.lengths[self.rows],
        )

    def per_head(self, t: Tensor | None) -> Tensor | None:
        """The slab's part of a tensor `[B, T, H, ...]` or `[H]`."""
        if t is None:
            return None
        return t[self.heads] if t.dim() == 1 else t[self.rows, :, self.heads]


def slabs(x: Operands) -> list[Slab]:
    """How to cut a call; one slab if there is nothing to gain."""
    batch, tokens, heads, value_dim = x.v.shape
    groups, key_dim = x.q.shape[2:]
    whole = [Slab(slice(None), slice(None), slice(None))]
    if x.v.device.type != "cpu" or batch == 0 or groups == 0:
        return whole
    per_group = max(tokens * heads // groups * max(key_dim, value_dim), 1)
    if batch * groups * per_group <= 2 * _SLAB:
        return whole
    return list(_cut(batch, groups, heads // groups, max(_SLAB // per_group, 1)))


def _cut(batch: int, groups: int, repeat: int, size: int) -> Iterator[Slab]:
    """Slabs of about `size` groups: parts of a row, or several whole rows."""
    if size < groups:
        for row in range(batch):
            for g in range(0, groups, size):
                end = min(g + size, groups)
                yield Slab(slice(row, row + 1), slice(g, end), slice(g * repeat, end * repeat))
    else:
        rows = max(size // groups, 1)
        for row in range(0, batch, rows):
            yield Slab(slice(row, row + rows), slice(None), slice(None))


def forward(x: Operands, scale: float, return_final_state: bool) -> tuple[Tensor, Tensor]:
    """As `sequence.forward`."""
    parts = slabs(x)
    if len(parts) == 1:
        return sequence.forward(x, scale, return_final_state)
    o = torch.empty(x.v.shape, dtype=x.v.dtype, device=x.v.device)
    states = x.v.new_empty(0, dtype=state_dtype(x.v.dtype))
    if return_final_state:
        levels = () if x.level_weights is None else (1 + x.level_weights.shape[-1],)
        states = states.new_empty(x.v.shape[0], x.v.shape[2], *levels, x.q.shape[3], x.v.shape[3])
    for part in parts:
        o_part, state = sequence.forward(part.of(x), scale, return_final_state)
        o[part.rows, :, part.heads] = o_part
        if return_final_state:
            states[part.rows, part.heads] = state
    return o, states


def backward(x: Operands, scale: float, grad_o: Tensor, grad_state: Tensor | None) -> list[Tensor | None]:
    """As `sequence.backward`."""
    parts = slabs(x)
    if len(parts) == 1:
        return sequence.backward(x, scale, grad_o, grad_state)
    grads = [None if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in x[:7]]
    per_head = x.log_decay is not None and x.log_decay.dim() == 1
    if per_head and x.log_decay is not None:  # summed over slabs, so not rounded before
        grads[4] = torch.zeros(x.log_decay.shape, dtype=state_dtype(x.v.dtype), device=x.v.device)
    for part in parts:
        state = None if grad_state is None else grad_state[part.rows, part.heads]
        found = sequence.backward(part.of(x), scale, grad_o[part.rows, :, part.heads], state)
        q, k, v, w, g, beta, start = grads
        assert q is not None
        assert k is not None
        assert v is not None
        targets = part.of(Operands(q, k, v, w, g, beta, start, None))[:7]
        for i, (target, grad) in enumerate(zip(targets, found, strict=True)):
            if target is None:
                continue
            if grad is None:
                target.zero_()
            elif i == 4 and per_head:
                target.add_(grad)
            else:
                target.copy_(grad)
    return grads
