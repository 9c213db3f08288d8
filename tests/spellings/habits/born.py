"""Time that is no axis of the input: the model makes the sequence that it mixes.

`example` gives an input of which the sequence that is mixed has the asked length.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.spellings.habits.layer import Layer, faded, masked, misses, stepped, summed
from tests.spellings.registry import WIDTH, Operands, positive


def normal(*sizes: int, seed: int) -> tuple[Tensor, ...]:
    return (torch.randn(sizes, generator=torch.Generator().manual_seed(seed)),)


@positive("a class token in front", length=19, twins={"seen by all": "not causal: the class token sees all patches"})
class ClassToken(Layer):
    """A learned row before the first token, expanded to the batch."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.cls = nn.Parameter(torch.randn(1, 1, WIDTH))

    def example(self, length: int, batch: int = 2, seed: int = 0) -> tuple[Tensor, ...]:
        return super().example(length - 1, batch, seed)

    def tokens(self, x: Tensor) -> Tensor:
        return torch.cat([self.cls.expand(x.shape[0], -1, -1), x], dim=1)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("bthk,bshk->bhts", q, k)
        seen = torch.ones(q.shape[1], q.shape[1], device=q.device).tril()
        if self.miss == "seen by all":
            seen[0] = 1
        return torch.einsum("bhts,bshv->bthv", scores * seen, v)


@positive("a first token that is cut off again", decay="scalar", length=19, twins=misses("linear"))
class FirstTokenCut(Layer):
    """A BOS row of an embedding goes in front; behind the layer it is dropped."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.special = nn.Embedding(3, WIDTH)
        self.rate = nn.Parameter(torch.tensor([0.2, 0.7]))

    def example(self, length: int, batch: int = 2, seed: int = 0) -> tuple[Tensor, ...]:
        return super().example(length - 1, batch, seed)

    def tokens(self, x: Tensor) -> Tensor:
        first = self.special(torch.zeros(x.shape[0], 1, dtype=torch.long, device=x.device))
        return torch.cat((first, x), 1)

    def operands(self, x: Tensor) -> Operands:
        return {**super().operands(x), "log_decay": -self.rate}

    def forward(self, x: Tensor) -> Tensor:
        y = faded(*self.parts(self.tokens(x)), -self.rate, self.miss)
        return x + self.out(y.flatten(2))[:, 1:]


@positive("patches by a strided convolution", length=12, twins=misses("softmax"))
class Strided(Layer):
    """[B, D, 4 T] frames -> T tokens."""

    layout = "bdt"

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.stem = nn.Conv1d(WIDTH, WIDTH, kernel_size=4, stride=4)

    def example(self, length: int, batch: int = 2, seed: int = 0) -> tuple[Tensor, ...]:
        return super().example(4 * length, batch, seed)

    def tokens(self, x: Tensor) -> Tensor:
        return F.gelu(self.stem(x)).transpose(1, 2)


@positive("frames of a waveform", length=15, twins=misses("cummax"))
class Frames(Layer):
    """[B, samples] cut by unfold into frames that overlap."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.frame = nn.Linear(10, WIDTH)

    def example(self, length: int, batch: int = 2, seed: int = 0) -> tuple[Tensor, ...]:
        return normal(batch, 5 * length + 5, seed=seed)

    def tokens(self, x: Tensor) -> Tensor:
        return self.frame(x.unfold(-1, 10, 5))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return summed(q, k, v, self.miss)


@positive("a sequence in one row", length=14, twins=misses("tanh"))
class OneRow(Layer):
    """The input is [B, T * D]; so is the output."""

    def example(self, length: int, batch: int = 2, seed: int = 0) -> tuple[Tensor, ...]:
        return normal(batch, length * WIDTH, seed=seed)

    def tokens(self, x: Tensor) -> Tensor:
        return x.view(x.size(0), -1, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = stepped(*self.parts(self.tokens(x)), self.miss)
        return x + self.out(y.flatten(2)).reshape(x.shape)


@positive("zeros in front", length=20, twins=misses("one ahead"))
class ZerosInFront(Layer):
    """Three empty tokens before the first one; with a bias their keys are not zero."""

    def example(self, length: int, batch: int = 2, seed: int = 0) -> tuple[Tensor, ...]:
        return super().example(length - 3, batch, seed)

    def tokens(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 3, 0))


@positive("returns, states and actions in turn", length=18, twins=misses("softmax"))
class InTurn(Layer):
    """A decision transformer's three streams; only what follows a state is kept."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.streams = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def example(self, length: int, batch: int = 2, seed: int = 0) -> tuple[Tensor, ...]:
        return super().example(length // 3, batch, seed)

    def tokens(self, x: Tensor) -> Tensor:
        stacked = torch.stack([f(x) for f in self.streams], dim=1)
        return stacked.permute(0, 2, 1, 3).reshape(x.shape[0], 3 * x.shape[1], WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.out(masked(*self.parts(self.tokens(x)), self.miss).flatten(2))
        y = y.reshape(x.shape[0], -1, 3, WIDTH).permute(0, 2, 1, 3)
        return x + y[:, 1]


@positive("the second half of the sequence", length=12, twins=misses("soft"))
class SecondHalf(Layer):
    """What is predicted is the second half; the first one is context that another part reads."""

    def example(self, length: int, batch: int = 2, seed: int = 0) -> tuple[Tensor, ...]:
        return super().example(2 * length, batch, seed)

    def tokens(self, x: Tensor) -> Tensor:
        return x.chunk(2, dim=1)[1]

    def forward(self, x: Tensor) -> Tensor:
        second = self.tokens(x)
        return second + self.out(summed(*self.parts(second), self.miss).flatten(2))


@positive("pixels in the order of reading", length=16, twins=misses("full"))
class Pixels(Layer):
    """[B, C, H, W] images: a pixel is a token."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.enter = nn.Conv2d(3, WIDTH, 2, 2)

    def example(self, length: int, batch: int = 2, seed: int = 0) -> tuple[Tensor, ...]:
        return normal(batch, 3, 8, length // 2, seed=seed)

    def tokens(self, x: Tensor) -> Tensor:
        return self.enter(x).flatten(2).transpose(1, 2)


@positive("registers in front and a question behind", length=16, twins=misses("abs"))
class Registers(Layer):
    """Learned tokens on both sides; only the last token's output is read."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.registers, self.question = nn.Parameter(torch.randn(3, WIDTH)), nn.Parameter(torch.randn(WIDTH))

    def example(self, length: int, batch: int = 2, seed: int = 0) -> tuple[Tensor, ...]:
        return super().example(length - 4, batch, seed)

    def tokens(self, x: Tensor) -> Tensor:
        size = x.shape[0]
        return torch.cat([self.registers.repeat(size, 1, 1), x, self.question.repeat(size, 1, 1)], 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x)
        return (x + self.out(masked(*self.parts(x), self.miss).flatten(2)))[:, -1]


@positive("twice as many tokens", length=16, twins=misses("window"))
class Upsampled(Layer):
    """A transposed convolution makes two tokens of one."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.up = nn.ConvTranspose1d(WIDTH, WIDTH, 2, stride=2)

    def example(self, length: int, batch: int = 2, seed: int = 0) -> tuple[Tensor, ...]:
        return super().example(length // 2, batch, seed)

    def tokens(self, x: Tensor) -> Tensor:
        return self.up(x.mT).mT
