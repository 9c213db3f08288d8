"""Cost: what a mixer costs as a linear and as a log-linear one, symbolic in its sizes.

Counted is one forward pass over B sequences of T tokens, by the chunked algorithm of docs/kernels.md. Operations are
those of matrix products (multiply-adds times two), which `torch.utils.flop_counter` counts in the ATen lowering, too;
bytes are what a pass reads and writes when each tile is read once. Estimates: caches, sums element
by element and the inverse of a triangle (delta rule) are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import sympy

from llcompile.kernels.description import CHUNK, Correction, Decay
from llcompile.look.mixer_look import MixerLook

B, T, H, G, K, V, C, L, E = sympy.symbols("B T H G K V C L E", positive=True, integer=True)
SYMBOLS = {
    "B": "sequences", "T": "tokens per sequence", "H": "heads", "G": "groups of heads that share a query and a key",
    "K": "key width", "V": "value width", "C": "tokens per chunk", "L": "level weights per token",
    "E": "bytes per element of an operand",
}  # fmt: skip
_STATE = 4  # bytes of a number of a state: fp32


class log2(sympy.Function):  # type: ignore[misc]
    """The base-2 logarithm, unexpanded: sympy's own would print as log(x)/log(2)."""


# Blocks of earlier chunks that a chunk reads, on average: half of the bits of its number are set.
BLOCKS = log2(T / C) / 2


@dataclass(frozen=True)
class Cost:
    """Expressions in the letters of `SYMBOLS`.

    Args:
        operations: of matrix products, in one forward pass.
        bytes: read and written in it.
        state: bytes that one more token needs of the past, for all heads and sequences.
    """

    operations: Any
    bytes: Any
    state: Any

    def at(self, values: Mapping[str, int]) -> dict[str, int]:
        """The numbers at these sizes, by the names of the fields; a sequence shorter than a chunk counts as one."""
        given = {sympy.Symbol(n, positive=True, integer=True): v for n, v in values.items()}
        given[T] = max(given[T], given[C])
        exact = {name: expr.subs(given).replace(log2, lambda x: sympy.log(x, 2)) for name, expr in vars(self).items()}
        return {name: round(float(expr)) for name, expr in exact.items()}


@dataclass(frozen=True)
class MixerCost:
    """What a mixer costs before and after.

    Args:
        module: its module's name.
        linear, loglinear: as expressions.
        parameters: numbers that the level weights add to the model.
        values: the mixer's own sizes; T is the length of the example.
    """

    module: str
    linear: Cost
    loglinear: Cost
    parameters: int
    values: Mapping[str, int]

    def at(self, length: int | None = None) -> dict[str, dict[str, int]]:
        """{"linear": {...}, "loglinear": {...}} at a length (the example's, if none is given)."""
        values = {**self.values, "T": length or self.values["T"]}
        return {"linear": self.linear.at(values), "loglinear": self.loglinear.at(values)}

    def __str__(self) -> str:
        lines = [f"{'linear':<11}{name:<11}{expr}" for name, expr in vars(self.linear).items()]
        lines += [f"{'log-linear':<11}{name:<11}{expr}" for name, expr in vars(self.loglinear).items()]
        return "\n".join([*lines, f"{'':<11}parameters {self.parameters:,}"])


def cost_of(mixer: MixerLook) -> MixerCost | None:
    """What a mixer costs; None for one that was declined."""
    call = mixer.call
    if call is None:
        return None
    s, d = call.sizes, call.description
    values = {"B": s.batch, "T": s.length, "H": s.heads, "G": s.groups, "K": s.key_dim, "V": s.value_dim}
    values |= {"C": CHUNK, "L": call.levels or 0, "E": d.dtype.itemsize}
    return MixerCost(mixer.name, *costs(d.decay, d.correction), mixer.parameters, values)


@lru_cache(maxsize=16)
def costs(decay: Decay, correction: Correction) -> tuple[Cost, Cost]:
    """The costs of a family: of the linear operator, and of the log-linear one."""
    if decay == "rate" and correction == "none":
        return _scan()
    delta = correction != "none"
    read = H * 2 * K * V
    # The query is pulled back through each block that it has read, but for the last one.
    pulls = (BLOCKS - sympy.Rational(1, 2)) * H * 2 * K**2 if delta else 0
    linear = _chunks(decay, correction) + _carry(delta, weighted=False) + read
    loglinear = _chunks(decay, correction) + _carry(delta, weighted=True) + BLOCKS * read + pulls
    erase = 2 * G * K if correction == "erase" else 0
    operands = E * (2 * G * K + 2 * H * V + erase + (H if delta else 0)) + _decay_bytes(decay)
    chunk_states = _STATE * H * (K * V + (K * K if delta else 0)) / C
    # A chunk's state is written and read; a tree reads two blocks and writes one, and each chunk reads its blocks.
    return (
        Cost(_over(linear), _over(operands + 2 * chunk_states), _STATE * B * H * K * V),
        Cost(
            _over(loglinear),
            _over(operands + _STATE * H * L + (4 + BLOCKS) * chunk_states),
            _STATE * B * H * K * V * (log2(T) + 1),
        ),
    )


def _scan() -> tuple[Cost, Cost]:
    """The costs of rates without a correction: no matrix products, each token updates and reads the states it has."""
    occupied = log2(T) / 2 + 1
    write, level = 2 * H * K * V, 3 * H * K * V  # a level decays (1) and is read (2)
    operands, state = E * (2 * G * K + 2 * H * V) + 4 * H, _STATE * B * H * K * V
    return (
        Cost(_over(write + level), _over(operands), state),
        Cost(_over(write + occupied * level), _over(operands + _STATE * L), state * (log2(T) + 1)),
    )


def _over(per_token: Any) -> Any:
    """For all tokens, with what all terms share in front."""
    return B * T * sympy.collect(sympy.expand(per_token), [H, G])


def _chunks(decay: Decay, correction: Correction) -> Any:
    """Inside a chunk: scores, their products with values, and the chunk's contribution to the state."""
    # Decays per channel are applied to pairs, of which half are in the future; else a tile of all pairs is one product.
    channel = decay in ("channel", "rate")
    pairs = (C - 1) * K if channel else 2 * C * K
    scores = (H if channel else G) * pairs  # heads of a group have the same ones before decay
    operations = scores + H * (2 * C * V + 2 * K * V)
    if correction != "none":
        # Scores of keys (an erase key: of both readers and both writers); their triangle's inverse, multiplied with
        # scores and keys; effective queries; the transition.
        operations += (3 if correction == "erase" else 1) * scores + H * (2 * C**2 + 2 * C * K + 2 * C * K + 2 * K**2)
    return operations


def _carry(delta: bool, weighted: bool) -> Any:
    """From chunk to chunk: the delta rule's transitions are K x K matrices, multiplied with states and each other."""
    return H * 2 * K**2 * (K + (1 if weighted else 2) * V) / C if delta else 0


def _decay_bytes(decay: Decay) -> Any:
    return 4 * {"none": sympy.Integer(0), "scalar": H, "channel": H * K, "rate": H}[decay]
