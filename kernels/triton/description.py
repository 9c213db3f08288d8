"""What a set of kernels is made for: one small frozen record, from which everything else follows."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llcompile.kernels import header
from llcompile.kernels.operands import Operands
from llcompile.kernels.state import is_level_state
from llcompile.kernels.triton.chips import Backend, Chip

Decay = Literal["none", "scalar", "channel"]
Correction = Literal["none", "delta"]
OldState = Literal["none", "linear", "level"]

# Tokens of a chunk: near the optimum between work inside chunks (grows with it) and between them (shrinks with it).
CHUNK = 64
# Tokens of a block within which decays per channel are applied pair by pair.
BLOCK = 16
# Channels that a product of two matrices [K, K] takes at a time.
SLICE = 32
# What torch was built for: "cuda" where there is no device, too.
BACKEND: Backend = "hip" if torch.version.hip else "cuda"
# The smallest side of a matrix instruction, and bytes of a tile's row under which Hopper's are not to be trusted: rows
# of 32 and 64 bytes lie in shared memory in patterns of their own. With Triton 3.6.0 on an H200 15 of 21 cases with
# such rows gave wrong numbers or an illegal access, none without, and none with DISABLE_MMA_V3=1 (docs/kernels.md).
LEAST_TILE = 16
_HOPPER, _HOPPER_ROW = 90, 128
_TRITON_TYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


@dataclass(frozen=True)
class Description:
    """One member of the family of operators, as far as its kernels differ from those of another.

    `levels` is the number of level weights per token, None for the linear operator. `repeat` is H / G, the heads
    that share a query and a key. `padded` says that rows have lengths of their own, `packed` that sequences with
    lengths of their own lie in one row of the operands. `backend` is Triton's, `least_row` the fewest bytes that a
    row of a tile has (`on`).
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
    backend: Backend = BACKEND
    least_row: int = 0

    def on(self, chip: Chip) -> Description:
        """The same for `chip`, with tiles that its matrix instructions take."""
        return dataclasses.replace(self, backend=chip.backend, least_row=_HOPPER_ROW if chip.arch == _HOPPER else 0)

    def least_tile(self, dtype: torch.dtype) -> int:
        """The fewest channels that a tile of `dtype` has."""
        return max(LEAST_TILE, self.least_row // dtype.itemsize)

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
    def family(self) -> str:
        """What the mixer is, in a word for file names."""
        return f"{self.decay}_{self.correction}_{'log_linear' if self.weighted else 'linear'}"

    @property
    def key_tile(self) -> int:
        """K rounded up to what a matrix instruction takes."""
        return tile(self.key_dim, self.least_tile(self.dtype))

    @property
    def value_tile(self) -> int:
        """V rounded up to what a matrix instruction takes."""
        return tile(self.value_dim, self.least_tile(self.dtype))

    @property
    def dtype_name(self) -> str:
        """The operands' dtype in Triton's words."""
        return _TRITON_TYPES[self.dtype]

    def facts(self) -> dict[str, bool]:
        """What the conditions in the templates may ask."""
        return {
            "decayed": self.decay != "none",
            "scalar": self.decay == "scalar",
            "channel": self.decay == "channel",
            "delta": self.delta,
            "weighted": self.weighted,
            "continued": self.continued,
            "old": self.weighted and self.initial_state != "none",
            "started": self.initial_state != "none",
            "final": self.final_state,
            "padded": self.padded,
            "packed": self.packed,
            "grouped": self.repeat > 1,
            "digits": header.has_digits(self.key_dim * self.value_dim),
            # A loop over values of one turn is unrolled into all around it, and with tiles as wide as Hopper's that
            # spills: a second turn, over nothing, keeps it a loop.
            "twice": self.least_row > 0 and self.delta and self.key_dim > 64 >= self.value_dim,
        }


def tile(size: int, least: int = LEAST_TILE) -> int:
    """The least power of two that holds `size`, and at least `least`."""
    return max(least, 1 << max(size - 1, 0).bit_length())


def describe(x: Operands, final_state: bool) -> Description:
    """The description of one call."""
    g, old = x.log_decay, x.initial_state
    return Description(
        decay="none" if g is None else "channel" if g.dim() == 4 else "scalar",
        correction="none" if x.beta is None else "delta",
        key_dim=x.q.shape[3],
        value_dim=x.v.shape[3],
        repeat=x.v.shape[2] // x.q.shape[2],
        dtype=x.v.dtype,
        levels=None if x.level_weights is None else x.level_weights.shape[-1],
        initial_state="none" if old is None else "level" if is_level_state(old) else "linear",
        final_state=final_state,
        padded=x.lengths is not None and x.starts is None,
        packed=x.starts is not None,
    )


def describe_step(q: Tensor, v: Tensor, w: Tensor | None, log_decay: Tensor | None, beta: Tensor | None) -> Description:
    """The description of a step; `q [B, G, K]`, `v [B, H, V]`, `w [B, H, L]`."""
    return Description(
        decay="none" if log_decay is None else "channel" if log_decay.dim() == 3 else "scalar",
        correction="none" if beta is None else "delta",
        key_dim=q.shape[-1],
        value_dim=v.shape[-1],
        repeat=v.shape[1] // q.shape[1],
        dtype=v.dtype,
        levels=None if w is None else w.shape[-1],
    )
