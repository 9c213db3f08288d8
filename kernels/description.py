"""What generated code is made for: one small frozen record of a call, from which everything else follows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import torch

from llcompile.kernels.operands import Operands, Token
from llcompile.kernels.state import is_level_state

# "rate" is a decay per channel that is given as one per head, times a rate per channel that is the same for all tokens.
Decay = Literal["none", "scalar", "channel", "rate"]
Correction = Literal["none", "delta", "erase"]
OldState = Literal["none", "linear", "level"]

# Tokens of a chunk: near the optimum between work inside chunks (grows with it) and between them (shrinks with it).
CHUNK = 64


@dataclass(frozen=True)
class Description:
    """One member of the family of operators, as far as code for it differs from that for another.

    `levels` is the number of level weights per token, None for the linear operator. `repeat` is H / G, the heads
    that share a query and a key. `padded` says that rows have lengths of their own, `packed` that sequences with
    lengths of their own lie in one row of the operands.
    """

    decay: Decay
    correction: Correction
    key_dim: int
    value_dim: int
    repeat: int = 1
    dtype: torch.dtype = torch.bfloat16
    chunk: int = CHUNK
    levels: int | None = None
    initial_state: OldState = "none"
    final_state: bool = False
    padded: bool = False
    packed: bool = False

    @property
    def weighted(self) -> bool:
        """Whether there are level weights."""
        return self.levels is not None

    @property
    def delta(self) -> bool:
        """Whether the state is corrected by the delta rule."""
        return self.correction == "delta"

    @property
    def continued(self) -> bool:
        """Whether rows start at a position of their own: a level state carries one."""
        return self.weighted and self.initial_state == "level"

    @property
    def without_kernels(self) -> str | None:
        """Why no kernels are generated for it; None where they are."""
        if self.decay == "rate" and self.correction != "none":
            return f"there are no kernels for decay {self.decay!r} with correction {self.correction!r}"
        return None

    @property
    def family(self) -> str:
        """What the mixer is, in a word for file names."""
        return f"{self.decay}_{self.correction}_{'log_linear' if self.weighted else 'linear'}"

    @property
    def dtype_name(self) -> str:
        """The operands' dtype in a word, as torch and Triton have it."""
        return str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class ReadoutDescription:
    """One call of per-level readouts: L levels of keys of R channels."""

    levels: int
    channels: int
    dtype: torch.dtype
    without_kernels: ClassVar[None] = None  # as of `Description`


def describe(x: Operands, final_state: bool) -> Description:
    """The description of one call."""
    g, w, old, (_, _, heads, value_dim) = x.log_decay, x.level_weights, x.initial_state, x.v.shape
    _, _, groups, key_dim = x.q.shape
    return _description(
        "none" if g is None else "rate" if x.decay_rate is not None else "channel" if g.dim() == 4 else "scalar",
        "erase" if x.erase_key is not None else "none" if x.beta is None else "delta",
        *(key_dim, value_dim, heads // groups, x.v.dtype, CHUNK, None if w is None else w.shape[-1]),
        "none" if old is None else "level" if is_level_state(old) else "linear",
        final_state,
        *(x.lengths is not None and x.starts is None, x.starts is not None),
    )


def describe_step(x: Token) -> Description:
    """The description of a step."""
    g, w, (_, heads, value_dim), (_, groups, key_dim) = x.log_decay, x.level_weights, x.v.shape, x.q.shape
    return _description(
        "none" if g is None else "rate" if x.decay_rate is not None else "channel" if g.dim() == 3 else "scalar",
        "erase" if x.erase_key is not None else "none" if x.beta is None else "delta",
        *(key_dim, value_dim, heads // groups, x.v.dtype, CHUNK, None if w is None else w.shape[-1]),
    )


# A call looks one up several times; they are few.
_description = lru_cache(maxsize=512)(Description)
