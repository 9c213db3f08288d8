"""Small operands for each description of a call: what a test of its kernels runs on (`acceptance`).

They are made on the CPU from a fixed seed, whatever the caller's generators hold, and are the same on every device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llcompile.kernels.description import Description, ReadoutDescription
from llcompile.kernels.operands import Operands, Token
from llcompile.kernels.readouts import Readouts, ReadoutToken
from llcompile.kernels.triton import blocks
from llcompile.kernels.triton.description import BLOCK, SPAN

# Six whole chunks of 64 and a part of one: pairs at two levels of the tree, and a block without a partner.
TOKENS = 393
# Tokens of a segment, where calls go in segments: three whole ones, of two chunks, and a part of one.
SEGMENT = 128
# Lengths of rows, and of packed sequences, which are TOKENS together.
_ROWS, _PACKED = (TOKENS, 70), (70, 1, TOKENS - 71)
# Positions of rows that continue: in a step after 63 tokens all levels merge.
_POSITIONS = (63, 6, 0)
STEPS = 3
Forward = Callable[[Operands, float, bool], tuple[Tensor, Tensor]]


class Source:
    """Random numbers, and the operands that are made of them."""

    def __init__(self, d: Description, seed: int = 0) -> None:
        self.d, self.random = d, torch.Generator().manual_seed(seed)
        self.groups = 2 if d.repeat <= 8 else 1
        self.heads = self.groups * d.repeat

    def normal(self, *shape: int) -> Tensor:
        """Of mean 0 and variance 1, in float32."""
        return torch.randn(shape, dtype=torch.float32, generator=self.random)

    def units(self, *shape: int) -> Tensor:
        """Rows of length 1: keys with which the delta rule contracts."""
        return torch.nn.functional.normalize(self.normal(*shape), dim=-1)

    def operands(self, batch: int, tokens: int) -> Operands:
        """`[B, T, ...]`, rounded to the description's dtype; log decays and rates stay in float32."""
        d, keys = self.d, (batch, tokens, self.groups, self.d.key_dim)
        heads = (batch, tokens, self.heads)
        decays = {"none": None, "channel": (*heads, d.key_dim)}.get(d.decay, heads)
        erase = self.units(*keys) if d.correction == "erase" else None
        x = Operands(
            *(self.normal(*keys), self.units(*keys), self.normal(*heads, d.value_dim)),
            None if d.levels is None else self.normal(*heads, d.levels),
            None if decays is None else -0.2 * self.normal(*decays).abs(),
            2 * torch.rand(self.heads, d.key_dim, generator=self.random) if d.decay == "rate" else None,
            None if d.correction == "none" else 2 * torch.rand(heads, generator=self.random),
            erase,
            None if erase is None else 0.5 * erase + 0.2 * self.units(*keys),
        )
        if x.log_decay is not None and d.decay == "channel":  # half of the blocks go by pairs, half by products
            x.log_decay[:, BLOCK // 2 :: 2 * BLOCK, :, 0] = -2 * SPAN
        fine = ("log_decay", "decay_rate")
        return Operands(*(t if t is None or n in fine else t.to(d.dtype) for n, t in zip(x._fields, x, strict=True)))  # type: ignore[arg-type]

    def state(self, rows: int, kind: str, forward: Forward) -> Tensor | None:
        """An initial state in float32; one with levels is what `forward` gives after `_POSITIONS` tokens."""
        if kind == "none":
            return None
        if kind == "linear":
            return self.normal(rows, self.heads, self.d.key_dim, self.d.value_dim)
        lengths = torch.tensor(_POSITIONS[:rows])
        before = in_double(self.operands(rows, max(_POSITIONS)))._replace(lengths=lengths)
        return forward(before, 1.0, True)[1].float()


def sequence(d: Description, forward: Forward) -> Operands:
    """Operands that `describe` gives `d` for."""
    source = Source(d)
    lengths = _ROWS if d.padded else _PACKED if d.packed else None
    x = source.operands(len(_ROWS) if d.padded else 1, TOKENS)
    if lengths is not None:
        x = x._replace(lengths=torch.tensor(lengths))
    if d.packed:
        x = x._replace(starts=torch.tensor([0, *_PACKED[:-1]]).cumsum(0))
    return x._replace(initial_state=source.state(x.rows, d.initial_state, forward))


def in_blocks(d: Description) -> Operands:
    """Operands for the forward pass in blocks: two whole ones, which make a pair, and a part of one."""
    chunks = 2 * blocks.WALK + 2
    x = Source(d).operands(1, chunks * d.chunk - 30)
    return x._replace(lengths=torch.tensor([x.v.shape[1] - 7])) if d.padded else x


def tokens(d: Description, forward: Forward) -> list[Token]:
    """Tokens for steps, one after another; each has the first state, which a test replaces."""
    source = Source(d)
    state = source.state(2, "linear" if d.levels is None else "level", forward)
    assert state is not None
    x = source.operands(2, STEPS)
    found = []
    for t in range(STEPS):
        one = dict(zip(x._fields, x, strict=True))
        now = {n: p if p is None or p.dim() < 3 else p[:, t] for n, p in one.items() if n in Token._fields}
        found.append(Token(**now, state=state, scale=1.0))  # type: ignore[arg-type]
    return found


def replayed(d: Description, forward: Forward) -> Operands:
    """A state and the tokens since, of which the last one reads."""
    source = Source(d)
    state = source.state(2, d.initial_state, forward)
    x = source.operands(2, STEPS + 2)
    weights = None if x.level_weights is None else x.level_weights[:, -1:]
    return x._replace(q=x.q[:, -1:], level_weights=weights, initial_state=state)


def readouts(d: ReadoutDescription) -> Readouts:
    """Two sets of readouts."""
    random = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, TOKENS, 2, d.channels, generator=random).to(d.dtype) for _ in range(2))
    return Readouts(query, key, d.levels)


def readout_tokens(x: Readouts, state: Tensor) -> list[ReadoutToken]:
    """Tokens for steps, as `tokens`."""
    return [ReadoutToken(x.query[:, t], x.key[:, t], state, x.levels) for t in range(STEPS)]


def in_double(x: Operands) -> Operands:
    """The same numbers in float64."""
    return Operands(*(t.double() if t is not None and t.is_floating_point() else t for t in x))  # type: ignore[arg-type]


def of_token(x: Token, function: Callable[[Tensor], Tensor]) -> Token:
    """`function` of each of its tensors."""
    return Token(*(function(t) if isinstance(t, Tensor) else t for t in x))  # type: ignore[arg-type]


def moved(x: Operands, device: torch.device) -> Operands:
    """On `device`."""
    return Operands(*(t if t is None else t.to(device) for t in x))  # type: ignore[arg-type]
