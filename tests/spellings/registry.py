"""The corpus' tables, POSITIVE, NEGATIVE and EITHER, and how an entry gets into them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from llcompile.patterns.families import Correction, Decay

Operands = dict[str, Any]
WIDTH = 20


class Mixer(nn.Module):
    """A layer with one mixer in it, and what a test has to know about it.

    `forward` is written in any style. `miss` names the one change that turns a layer into something else; the layer's
    code looks at it in one place.
    """

    layout = "btd"  # of the input: any order of b, t and d, b may be absent
    mixed_at = "out"  # the submodule whose input is the mixer's output

    def __init__(self, miss: str = "") -> None:
        super().__init__()
        self.miss = miss

    def operands(self, *inputs: Any, **_: Any) -> Operands:
        """What the mixer is made of: q, k [B, T, G, K], v [B, T, H, V] and, where it has them, log_decay, beta,
        erase_query, erase_key, scale and normaliser (a function of the denominator [B, T, H, 1], which is the mixer of
        ones); early where the state is read before it is written to, and then own, the weight [B, T, H] of a token in
        its own output."""
        raise NotImplementedError

    def heads_last(self, mixed: Tensor) -> Tensor:
        """The mixer's output as it lies in the code -> [B, T, H, V] (H and V may be merged)."""
        return mixed

    def mixed(self, *inputs: Any, **_: Any) -> Tensor:
        """The mixer's own output, [B, T, H * V]."""
        return self.heads_last(fed(self, self.mixed_at, *inputs)).flatten(2)

    def example(self, length: int, batch: int = 2, seed: int = 0) -> tuple[Tensor, ...]:
        """Inputs of `forward`."""
        generator = torch.Generator().manual_seed(seed)
        sizes = {"b": batch, "t": length, "d": WIDTH}
        return (torch.randn([sizes[axis] for axis in self.layout], generator=generator),)


@dataclass(frozen=True)
class Spelling:
    """A layer that is a mixer of the family (decay, correction).

    `length` is the usual one, and the only one if `fixed`. `tolerance` is how near float64 it comes to the family.
    `differentiable`: the layer itself has a backward. `also` are other families that it is as well, with other
    operands that stand in the code. `file` is the module that it is written in.
    """

    name: str
    make: Callable[[], Mixer]
    decay: Decay
    correction: Correction
    length: int = 24
    fixed: bool = False
    tolerance: float = 1e-9
    differentiable: bool = True
    also: tuple[tuple[Decay, Correction], ...] = ()
    file: str = ""

    @property
    def cells(self) -> tuple[tuple[Decay, Correction], ...]:
        """The families that it may be found to be."""
        return ((self.decay, self.correction), *self.also)

    def example(self, length: int | None = None, batch: int = 2, seed: int = 0) -> tuple[Tensor, ...]:
        """Inputs of the layer."""
        return self.make().example(length or self.length, batch, seed)


@dataclass(frozen=True)
class NearMiss:
    """A layer that is no such mixer because `property` fails; `twin_of` names the spelling it was made from.

    `file` is the module that it is written in.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int, int, int], tuple[Tensor, ...]]
    property: str
    twin_of: str = ""
    length: int = 24
    file: str = ""

    def example(self, length: int | None = None, batch: int = 2, seed: int = 0) -> tuple[Tensor, ...]:
        """Inputs of the layer."""
        return self.inputs(length or self.length, batch, seed)


POSITIVE: dict[str, Spelling] = {}
NEGATIVE: dict[str, NearMiss] = {}
# Members in disguise: `property` says as what. Neither finding one nor leaving it is a mistake.
EITHER: dict[str, NearMiss] = {}
M = TypeVar("M", bound=type[Mixer])
N = TypeVar("N", bound=type[nn.Module])


def positive(
    name: str,
    decay: Decay = "none",
    correction: Correction = "none",
    twins: dict[str, str] | None = None,
    length: int = 24,
    fixed: bool = False,
    tolerance: float = 1e-9,
    differentiable: bool = True,
    also: tuple[tuple[Decay, Correction], ...] = (),
    **sizes: Any,
) -> Callable[[M], M]:
    """Registers a layer and its twins (`miss` -> the property that fails); `sizes` go to its constructor."""

    def register(cls: M) -> M:
        assert name not in POSITIVE, name
        make = seeded(cls, **sizes)
        file = cls.__module__
        POSITIVE[name] = Spelling(name, make, decay, correction, length, fixed, tolerance, differentiable, also, file)
        for miss, failing in (twins or {}).items():
            twin = f"{name}, {miss}"
            other = seeded(cls, miss=miss, **sizes)
            NEGATIVE[twin] = NearMiss(twin, other, make().example, failing, name, length, file)
        return cls

    return register


def negative(name: str, failing: str, length: int = 24) -> Callable[[N], N]:
    """Registers another mechanism, with the property that it has not."""
    return _mechanism(NEGATIVE, name, failing, length)


def either(name: str, disguise: str, length: int = 24) -> Callable[[N], N]:
    """Registers a member in disguise, with what would have to be found."""
    return _mechanism(EITHER, name, disguise, length)


def _mechanism(table: dict[str, NearMiss], name: str, about: str, length: int) -> Callable[[N], N]:
    def register(cls: N) -> N:
        assert name not in table, name
        table[name] = NearMiss(name, seeded(cls), _plain_input, about, length=length, file=cls.__module__)
        return cls

    return register


def _plain_input(length: int, batch: int, seed: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(seed)),)


def seeded(cls: Callable[..., Any], **arguments: Any) -> Callable[[], Any]:
    """A constructor that makes the same layer each time, without touching the random stream of the caller."""

    def make() -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return cls(**arguments)

    return make


def fed(module: nn.Module, name: str, *inputs: Tensor) -> Tensor:
    """What the submodule `name` is called with when the module runs."""
    (seen,) = calls(module, name, *inputs)
    return seen


def calls(module: nn.Module, name: str, *inputs: Tensor) -> list[Tensor]:
    """What the submodule `name` is called with, call after call."""
    seen: list[Tensor] = []
    handle = module.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        module(*inputs)
    finally:
        handle.remove()
    return seen
