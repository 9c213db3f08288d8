"""The Mixer node: one linear-time mixer, independent of the code that it was found in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from llcompile.errors import MixerError
from llcompile.kernels.routing_state import room
from llcompile.patterns.families import FAMILIES, Correction, Decay

Value = TypeVar("Value")


@dataclass(frozen=True)
class Mixer:
    """One linear-time mixer, bound to its operands.

    An operand is a tensor in a proof and an `fx.Proxy` in a rewrite, hence `Any`. Shapes are those of the operator (see
    llcompile.ops), without T for a single step:

    Args:
        query: [B, T, G, K].
        key: [B, T, G, K].
        value: [B, T, H, V], G divides H.
        log_decay: [B, T, H] for decay "scalar", [B, T, H, K] for "channel", None for "none"; <= 0.
        decay_rate: [H, K], >= 0: the log decay of a channel is log_decay [B, T, H] times this; or None.
        beta: [B, T, H] for correction "delta"; for "erase" a factor of the erase key, or None.
        erase_query, erase_key: [B, T, G, K] for correction "erase", else None.
        initial_state: a linear state [B, H, K, V], a level state [B, H, 1 + L, K, V], or None.
        scale: factor on the query.
        step: True for a single token (no T axis).
        early: True where a query reads the state before its own token changes it: o_t = scale * q_t^T S_{t-1}.
    """

    decay: Decay
    correction: Correction
    query: Any
    key: Any
    value: Any
    log_decay: Any = None
    decay_rate: Any = None
    beta: Any = None
    erase_query: Any = None
    erase_key: Any = None
    initial_state: Any = None
    scale: float = 1.0
    step: bool = False
    early: bool = False

    def __post_init__(self) -> None:
        if (self.decay, self.correction) not in FAMILIES:
            raise MixerError(f"no family has decay {self.decay!r} and correction {self.correction!r}; see families.py.")
        if (self.decay == "none") != (self.log_decay is None):
            raise MixerError(f"decay {self.decay!r} does not fit a log_decay that is {_given(self.log_decay)}.")
        if self.decay_rate is not None and self.decay != "channel":
            raise MixerError(f"decay {self.decay!r} does not fit rates per channel.")
        if self.correction != "erase" and (self.correction == "none") != (self.beta is None):
            raise MixerError(f"correction {self.correction!r} does not fit a beta that is {_given(self.beta)}.")
        for name in ("erase_query", "erase_key"):
            operand = getattr(self, name)
            if (self.correction == "erase") != (operand is not None):
                raise MixerError(f"correction {self.correction!r} does not fit an {name} that is {_given(operand)}.")

    def transition(self) -> tuple[Any, ...]:
        """The operands of the state's transition, in the operator's order."""
        return self.log_decay, self.decay_rate, self.beta, self.erase_query, self.erase_key


def _given(operand: Any) -> str:
    return "absent" if operand is None else "given"


# Heads of width one that share a query and a key are the channels of what others would call a head: as many of them as
# a usual head is wide share their level weights.
CHANNELS = 64

# The width R of a routing query, where the header of a state has room for a key sum of that width for each level.
FEATURES = 16


@dataclass(frozen=True)
class MixerShape:
    """The sizes of a mixer: heads H, groups G, key width K, value width V."""

    heads: int
    groups: int
    key_dim: int
    value_dim: int

    @property
    def level_heads(self) -> int:
        """W, how many sets of level weights there are, each for H // W neighbouring heads (docs/level-weights.md).

        One for each head. For heads of width one that share a query and a key (Mamba-1's channels), one for each 64 of
        them, or one for all where 64 does not divide their number: level weights of their own would be as large as the
        states.
        """
        if self.value_dim > 1 or self.groups == self.heads:
            return self.heads
        return self.heads // CHANNELS if self.heads % CHANNELS == 0 else 1

    def features(self, wanted: int, levels: int, in_states: bool) -> int:
        """R, the width of a routing query: as wanted; `in_states`, what the header of a level state has room for."""
        if not in_states:
            return wanted
        return min(wanted, room(self.heads, self.level_heads, self.key_dim, self.value_dim) // levels)


def validate(mixer: Mixer) -> MixerShape:
    """Checks the shapes of a mixer whose operands are tensors (fake ones suffice) and returns its sizes.

    Raises:
        MixerError: an operand's rank or size does not fit the others.
    """
    time = 0 if mixer.step else 1
    rank = 3 + time
    for name in ("query", "key", "value"):
        _expect_rank(name, getattr(mixer, name), rank)
    groups, key_dim = (int(n) for n in mixer.query.shape[-2:])
    heads, value_dim = (int(n) for n in mixer.value.shape[-2:])
    if tuple(mixer.key.shape[-2:]) != (groups, key_dim):
        raise MixerError(f"key is {list(mixer.key.shape)}, expected the query's {list(mixer.query.shape)}.")
    if heads % groups:
        raise MixerError(f"{heads} value heads are not a multiple of {groups} query/key groups.")
    if mixer.log_decay is not None:
        per_head = mixer.decay == "scalar" or mixer.decay_rate is not None
        _expect_tail("log_decay", mixer.log_decay, rank, (heads,) if per_head else (heads, key_dim))
    if mixer.decay_rate is not None:
        _expect_tail("decay_rate", mixer.decay_rate, 2, (heads, key_dim))
    for name in ("erase_query", "erase_key"):
        if getattr(mixer, name) is not None:
            _expect_tail(name, getattr(mixer, name), rank, (groups, key_dim))
    if mixer.beta is not None:
        _expect_tail("beta", mixer.beta, rank, (heads,))
    return MixerShape(heads, groups, key_dim, value_dim)


def _expect_rank(name: str, tensor: torch.Tensor, rank: int) -> None:
    if tensor.dim() != rank:
        raise MixerError(f"{name} is {list(tensor.shape)}, expected {rank} axes.")


def _expect_tail(name: str, tensor: torch.Tensor, rank: int, tail: tuple[int, ...]) -> None:
    expected_rank = rank - 2 + len(tail)
    if tensor.dim() != expected_rank or tuple(tensor.shape[-len(tail) :]) != tail:
        raise MixerError(f"{name} is {list(tensor.shape)}, expected {expected_rank} axes that end in {list(tail)}.")
