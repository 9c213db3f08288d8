"""Models and data of the tests of trials: as small as they can be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY, WIDTH, LENGTH, LONGEST = 11, 8, 8, 16


class Linear(nn.Module):
    """Linear attention as a masked product."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return (q @ k.transpose(-1, -2)).tril() @ v


class Softmax(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Model(nn.Module):
    def __init__(self, mixer: type[nn.Module] = Linear, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.mixer = mixer()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.head(x + self.mixer(x) / 4)


class Recurrent(nn.Module):
    """A linear model that takes a state and gives one; `forgets` and `grows` are ways of getting that wrong."""

    def __init__(self, way: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way = way
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor, initial_state: Any = None, return_state: bool = False) -> Any:
        if self.way == "raises" and initial_state is not None:
            raise RuntimeError("not written yet")
        x = self.embed(tokens)
        if initial_state is not None and self.way not in ("ignores", "useless"):
            first = -initial_state if self.way == "wrong" else initial_state
            x = torch.cat([(first[:, -1:] if self.way == "grows" else first) + x[:, :1], x[:, 1:]], 1)
        sums = x if self.way == "useless" else x.cumsum(1)
        logits = self.head(sums)
        if self.way == "grows":  # as a cache of keys does
            past = sums if initial_state is None else torch.cat([initial_state, sums], 1)
        else:
            past = sums[:, -1:]
        return (logits, past) if return_state else logits


def batches(split: str, seed: int) -> Iterator[dict[str, Tensor]]:
    """Random tokens; a query's distance is told. Held-out sequences are twice as long."""
    generator = torch.Generator().manual_seed(seed if split == "train" else 1000)
    while True:
        tokens = torch.randint(VOCABULARY, (4, LENGTH if split == "train" else LONGEST), generator=generator)
        yield {"tokens": tokens, "distance": tokens}


def own_loss(model: Any, batch: Any) -> Tensor:
    return model(batch.tokens).square().mean()
