"""The definition of per-level readouts: the buckets' sums of keys, one token at a time, in float64.

The query of a token reads each bucket that log-linear attention gives it (arXiv 2506.04761) on its own; so a level
weight can depend on what a bucket holds, as the weights of segments in Memory Caching (arXiv 2602.24281) do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llcompile.kernels import routing_state
from llcompile.kernels.reference import sequences


def reference_readouts(
    query: Tensor,
    key: Tensor,
    levels: int,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    attention_mask: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Readouts `[B, T, W, L]` and final state; the signature of `llcompile.ops.level_readouts`."""
    _, _, sets, channels = query.shape
    query, key = query.to(dtype), key.to(dtype)
    out = query.new_zeros(*query.shape[:3], levels)
    finals = [query.new_zeros(0, sets, routing_state.size(levels, channels))]
    for number, (row, tokens) in enumerate(sequences(query, cu_seqlens, attention_mask)):
        sums, start = query.new_zeros(1, sets, levels, channels), torch.zeros(1, dtype=torch.int64, device=query.device)
        if initial_state is not None:
            sums, start = routing_state.unpack(initial_state[number : number + 1].to(dtype), levels)
        for t in tokens.tolist():
            sums = routing_state.merge(sums, start)
            sums = torch.cat([sums[:, :, :1] + key[row, t][None, :, None], sums[:, :, 1:]], 2)
            read = torch.einsum("wr,wlr->wl", query[row, t], sums[0])
            out = out.index_put((torch.tensor(row), torch.tensor(t)), read)
            start = start + 1
        finals.append(routing_state.pack(sums, start))
    return out, torch.cat(finals)
