"""Members of a family in disguise: with operands that stand nowhere in the code, or with a scale for each position.

Finding one is no duty, and no mistake either: what is made of it must compute the same, that is all.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.spellings.others import Heads
from tests.spellings.registry import WIDTH, either


class Delta(Heads):
    """A loop over tokens; a subclass says what one does to the state [B, H, K, V]."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.Linear(WIDTH, 4)

    def step(self, S: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, self.size)).unbind(2)
        k = F.normalize(k, dim=-1)
        a, b = self.gates(x).sigmoid()[..., None, None].chunk(2, 2)
        S, ys = x.new_zeros(x.shape[0], self.heads, self.size, self.size), []
        for t in range(x.shape[1]):
            S = self.step(S, k[:, t, ..., None], v[:, t, ..., None, :], a[:, t], b[:, t])
            ys.append((q[:, t, ..., None] * S).sum(-2))
        return x + self.out(torch.stack(ys, 1).flatten(2))


@either("delta rule with the wrong sign", "beta is negative, the value, too", length=12)
class WrongSign(Delta):
    def step(self, S: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return S + 0.3 * b * k * (v + (k * S).sum(-2, keepdim=True))


@either("beta applied twice to what is written", "the value is beta times the value", length=12)
class BetaTwice(Delta):
    def step(self, S: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return S + b * k * (b * v - (k * S).sum(-2, keepdim=True))


@either("a gate to erase and a gate to write", "the value is the ratio of the gates times the value", length=12)
class TwoGates(Delta):
    def step(self, S: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return S - a * k * (k * S).sum(-2, keepdim=True) + b * k * v


@either("error of the state before its decay", "beta is divided by the decay, the value multiplied", length=12)
class EarlyError(Delta):
    def step(self, S: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        a = 0.7 + 0.3 * a
        return a * S + 0.3 * b * k * (v - (k * S).sum(-2, keepdim=True))


@either("implicit delta rule", "beta is beta / (1 + beta)", length=12)
class Implicit(Delta):
    def step(self, S: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return S + b / (1 + b * (k * k).sum(-2, keepdim=True)) * k * (v - (k * S).sum(-2, keepdim=True))


@either("decay after the write", "the key is decayed before it is written", length=12)
class DecayedWrite(Delta):
    def step(self, S: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return a * (S + k * v)


@either("running mean of outer products", "the decay is t / (t + 1)")
class RunningMean(Heads):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        state = (k.unsqueeze(-1) * v.unsqueeze(-2)).cumsum(2)
        count = torch.arange(1, q.shape[2] + 1).to(q)[:, None, None]
        return torch.einsum("bhtk,bhtkv->bhtv", q, state / count)


@either("keys of the next step", "the key is the next token's: a shift outside of the mixer")
class NextKey(Heads):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.roll(-1, 2).mT).tril() @ v


@either("normalised by all tokens", "the query is divided by what comes from outside, the future included")
class FutureNormaliser(Heads):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = q.exp(), k.exp()
        scores = (q @ k.mT).tril() / (q @ k.sum(2, keepdim=True).mT)
        return scores @ v


@either("values mixed as logarithms", "the values are exponentials, the output is a logarithm")
class LogValues(Heads):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.log((q.exp() @ k.exp().mT).tril() @ v.exp())


@either("added scores", "queries and keys have a one beside the sum: a product of rank two")
class AddedScores(Heads):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q.sum(-1, keepdim=True) + k.sum(-1, keepdim=True).mT).tril() @ v


@either("three terms of a series", "features are products of features (Based)")
class TaylorScores(Heads):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = q @ k.mT / 3
        return (1 + s + s**2 / 2).tril() @ v


@either("decay linear in the distance", "two mixers of the same queries and keys, scaled by the position")
class LinearDecay(Heads):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        t = torch.arange(q.shape[2]).to(q)
        return (q @ k.mT * (1 + t[:, None] - t)).tril() @ v


@either("two mixers of the same values", "states of two keys are added: keys of both, one after another")
class TwoKeys(Heads):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first, second = (q @ k.mT).tril(), (q.roll(1, 1).sigmoid() @ k.exp().mT).tril()
        return (first - 0.5 * second) @ v


@either("state kept in blocks", "the decay is nought at the start of each block")
class Blocks(Heads):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        block = torch.arange(q.shape[2]) // 6
        return ((q @ k.mT) * (block[:, None] == block)).tril() @ v
