"""What a set of Triton kernels is made for: the description of a call, and what the chip adds to it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache

import torch

from llcompile.kernels import description, header
from llcompile.kernels.triton.chips import Backend, Chip

# Tokens of a block within which decays per channel are applied to pairs of tokens.
BLOCK = 16
# A decay between two tokens of a block is exp(a) exp(-b), with |a| and |b| at most half of the block's span of log
# decays. Up to this span these factors stay below 2.4e17, and what they multiply must be at most LARGEST. Sums over a
# block are then far from the largest number of fp32, and only operands below 2.8e-21 fall under its smallest. 15 log
# decays of -5, the lowest that KDA's bounded gate allows, fit. Beyond it a block goes pair by pair.
SPAN, LARGEST = 80.0, 2.0**30
# Channels that a product of two matrices [K, K] takes at a time.
SLICE = 32
# Kernels that go token by token and sum over lanes: the most numbers of a tile [lanes, K], and of one with all levels,
# which is 32 for each thread of 8 warps.
_PART, _STATES = 512, 8192
# What torch was built for: "cuda" where there is no device, too.
BACKEND: Backend = "hip" if torch.version.hip else "cuda"
# The smallest side of a matrix instruction, and bytes of a tile's row under which Hopper's are not to be trusted: rows
# of 32 and 64 bytes lie in shared memory in patterns of their own. With Triton 3.6.0 on an H200 15 of 21 cases with
# such rows gave wrong numbers or an illegal access, none without, and none with DISABLE_MMA_V3=1 (docs/kernels.md).
LEAST_TILE = 16
_HOPPER, _HOPPER_ROW = 90, 128


@dataclass(frozen=True)
class Description(description.Description):
    """A call's description with what Triton's compiler is told besides.

    `backend` is Triton's, `least_row` the fewest bytes that a row of a tile has (`on`). A program of the forward pass
    walks over `walk` chunks (`blocks`); 1: each chunk has a program of its own.
    """

    backend: Backend = BACKEND
    least_row: int = 0
    walk: int = 1

    @classmethod
    def of(cls, d: description.Description) -> Description:
        """`d` for the kind of device that torch was built for; `d` itself if it names one.

        With an erase key of its own there are kernels for decays per channel alone (`engine.per_channel`).
        """
        return d if isinstance(d, cls) else _of(d)

    def on(self, chip: Chip) -> Description:
        """The same for `chip`, with tiles that its matrix instructions take."""
        return dataclasses.replace(self, backend=chip.backend, least_row=_HOPPER_ROW if chip.arch == _HOPPER else 0)

    def least_tile(self, dtype: torch.dtype) -> int:
        """The fewest channels that a tile of `dtype` has."""
        return max(LEAST_TILE, self.least_row // dtype.itemsize)

    @property
    def key_tile(self) -> int:
        """K rounded up to what a matrix instruction takes; to a power of two where there is none."""
        return tile(self.key_dim, 1 if self.rated else self.least_tile(self.dtype))

    @property
    def value_tile(self) -> int:
        """V rounded up to what a matrix instruction takes."""
        return tile(self.value_dim, self.least_tile(self.dtype))

    @property
    def dense(self) -> bool:
        """Whether what a chunk does to a state is a matrix [K, K]."""
        return self.correction != "none"

    @property
    def low_levels(self) -> int:
        """Levels of chunks that are inside a block of `walk` chunks."""
        return self.walk.bit_length() - 1

    @property
    def rated(self) -> bool:
        """Whether kernels go token by token: decays by rates have no product of matrices."""
        return self.decay == "rate"

    @property
    def lanes(self) -> int:
        """Values of heads that a program has which goes token by token and sums over them."""
        return max(min(_PART, _STATES // self.level_tile) // self.key_tile, 1)

    @property
    def level_tile(self) -> int:
        """L rounded up to a power of two."""
        return tile(self.levels or 1, 1)

    def facts(self) -> dict[str, bool]:
        """What the conditions in the templates may ask."""
        return {
            "decayed": self.decay != "none",
            "scalar": self.decay == "scalar",
            "channel": self.decay == "channel",
            "delta": self.delta,
            "erase": self.correction == "erase",
            "dense": self.dense,
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
            "twice": self.least_row > 0 and self.dense and self.key_dim > 64 >= self.value_dim,
        }


@lru_cache(maxsize=512)
def _of(d: description.Description) -> Description:
    found = Description(**{field.name: getattr(d, field.name) for field in dataclasses.fields(d)})
    return dataclasses.replace(found, decay="channel") if d.correction == "erase" else found


def tile(size: int, least: int = LEAST_TILE) -> int:
    """The least power of two that holds `size`, and at least `least`."""
    return max(least, 1 << max(size - 1, 0).bit_length())
