"""The log-linear tree over chunks (docs/decisions/tree-over-chunks.md; arXiv 2506.04761, section 3).

Level `m` sees chunks as pairs of blocks of `2 ** m`. The rows of every right block read the state of their left
sibling with the weight of that level and are then pulled back over it, so that after the last level every row reads at
the start of the sequence. Blocks pair up for the next level: O(T log T) work in O(log T) steps, O(T) memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from llcompile.kernels.aten.transitions import Transition
from llcompile.kernels.grid import depth


def blocks(kind: Transition, p: Tensor, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The transitions and states of the blocks of each level, from those of the chunks `[M, N, ...]` on."""
    for _ in range(depth(x.shape[1])):
        yield p, x
        p, x = _joined(kind, p, x)


def siblings(chunks: int, m: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The chunks in right blocks of level `m`, and for each the left sibling among the blocks."""
    chunk = torch.arange(chunks)
    right = chunk[(chunk >> m) & 1 == 1].to(device)
    return right, (right >> m) - 1


def arriving(kind: Transition, p: Tensor, x: Tensor, start: Tensor) -> Tensor:
    """The states `[M, N, K, V]` that reach each chunk; `start [M, 1, K, V]` reaches the first.

    A block hands on what reaches it to its left half, and that carried through the left half to its right half.
    """
    if x.shape[1] == 1:
        return start
    above = arriving(kind, *_joined(kind, p, x), start)
    left, right = above, kind.push(p[:, ::2], above) + x[:, ::2]
    return torch.stack([left, right], 2).flatten(1, 2)[:, : x.shape[1]]


def _joined(kind: Transition, p: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks of one level -> blocks of the next; an unpaired last block moves up as it is."""
    even = x.shape[1] & ~1
    (p_left, p_right), (left, right) = ((t[:, :even:2], t[:, 1::2]) for t in (p, x))
    pushed = kind.push(p_right, left) + right
    return torch.cat([kind.compose(p_right, p_left), p[:, even:]], 1), torch.cat([pushed, x[:, even:]], 1)
