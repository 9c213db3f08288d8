"""Linear attention as people write it by hand: what ``llcompile bench rewrite`` and ``bench recognition`` measure."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Quadratic(nn.Module):
    """Causal linear attention as a product of scores and values: every pair of tokens has its score.

    Args:
        width: of the input and the output.
        heads: how many.
        decay: whether a gate of each head and token lets the past fade.
    """

    def __init__(self, width: int, heads: int, decay: bool) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.gate = nn.Linear(width, heads) if decay else None
        self.out_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, width] -> [B, T, width]."""
        b, t, _ = x.shape
        q, k, v = (p(x).view(b, t, self.heads, -1).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        mask = torch.ones(t, t, dtype=torch.bool, device=x.device).tril()
        if self.gate is None:
            scores = scores.masked_fill(~mask, 0)
        else:
            total = F.logsigmoid(self.gate(x) + 4).transpose(1, 2).cumsum(-1)
            log_decay = total[..., :, None] - total[..., None, :]
            scores = scores * log_decay.masked_fill(~mask, -math.inf).exp()
        return self.out_proj((scores @ v).transpose(1, 2).reshape(b, t, -1))


class TokenLoop(nn.Module):
    """The same with decay, one token after the other; a tracer unrolls the loop."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.gate = nn.Linear(width, heads)
        self.out_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, width] -> [B, T, width]."""
        b, t, width = x.shape
        q, k, v = (p(x).view(b, t, self.heads, -1) for p in (self.q_proj, self.k_proj, self.v_proj))
        decay = torch.sigmoid(self.gate(x) + 4)
        state = x.new_zeros(b, self.heads, q.shape[-1], v.shape[-1])
        outputs = []
        for i in range(t):
            state = decay[:, i, :, None, None] * state + k[:, i, :, :, None] * v[:, i, :, None, :]
            outputs.append((q[:, i, :, None, :] @ state).squeeze(-2))
        return self.out_proj(torch.stack(outputs, 1).reshape(b, t, width))
