"""What can run a call, a row each: the Triton kernels, the C++ kernels, and the ATen lowering, which runs anything.

Each is imported when it first runs.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from functools import lru_cache
from typing import ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from llcompile.errors import CompilerError
from llcompile.kernels import finite, routing_state
from llcompile.kernels.description import Description, ReadoutDescription
from llcompile.kernels.header import DIGITS
from llcompile.kernels.operands import COMPUTE_DTYPES, Operands, Token
from llcompile.kernels.readouts import Readouts, ReadoutToken
from llcompile.kernels.replay import with_silent_queries
from llcompile.kernels.state import check_positions, is_level_state, merged_state
from llcompile.kernels.triton.limits import current

Described = Description | ReadoutDescription
Sweep = Literal["forward", "backward", "step", "step in place", "replay", "fold"]


class ReadoutForm(Protocol):
    """One way to run per-level readouts: what `aten.readouts` has, in a module of its own."""

    def forward(self, x: Readouts, return_final_state: bool, /) -> tuple[Tensor, Tensor]:
        """As `aten.readouts.forward`."""

    def backward(self, x: Readouts, grad: Tensor, grad_state: Tensor | None, /) -> tuple[Tensor | None, ...]:
        """As `aten.readouts.backward`."""

    def step(self, x: ReadoutToken, /) -> tuple[Tensor, Tensor]:
        """As `aten.readouts.step`."""


class Implementation(ABC):
    """One way to run the operator.

    `name` is what `LLCOMPILE_KERNELS` calls it, `title` what messages do. `devices` are the kinds of device on which
    `auto` takes it.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    devices: ClassVar[tuple[str, ...]] = ()

    def reason(self, d: Described, device: torch.device) -> str | None:
        """Why it cannot run what `d` describes on `device`; None if it can, as far as is known before it is tried."""
        return None

    def rejection(self, d: Described, device: torch.device, sweep: Sweep) -> str | None:
        """Why a pass must not run by it, though it could: a test on this device found wrong numbers. None if it may.

        Raises `KernelTestError` where the test left the device unusable.
        """
        return None

    def watched(self, d: Described, device: torch.device, sweep: Sweep) -> contextlib.AbstractContextManager[None]:
        """Around a pass that may run: what must be known of it while it does."""
        return contextlib.nullcontext()

    def refusal(self, error: Exception, d: Described, device: torch.device) -> str | None:
        """What an error says if it means that this cannot be made for `d` on `device`; None if it means anything else.

        Holds for the whole process: it is not tried again.
        """
        return None

    @abstractmethod
    def forward(self, x: Operands, scale: float, return_final_state: bool) -> tuple[Tensor, Tensor]:
        """As `aten.sequence.forward`."""

    @abstractmethod
    def backward(self, x: Operands, scale: float, grad_o: Tensor, grad_state: Tensor | None) -> list[Tensor | None]:
        """As `aten.sequence.backward`."""

    @abstractmethod
    def step(self, token: Token, routing: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As `aten.token.step`, with a routing state in the headers of the new state if there is one.

        Raises:
            StateError: a state has lost its position or counts no further, or it has no room for `routing`.
        """

    def step_in_place(self, token: Token, routing: Tensor | None = None) -> Tensor:
        """The output of `step`; the new state is written into `token.state`, which must be of the kind that comes out.

        What stands in the headers beside the position stays, but for `routing`. Raises as `step`.
        """
        o, new = self.step(token, routing)
        if routing is None and is_level_state(new):
            new.flatten(3)[:, :, 0, DIGITS:] = token.state.flatten(3)[:, :, 0, DIGITS:]
        token.state.copy_(new)
        return o

    def replay(self, x: Operands, occupied: Tensor | None, scale: float) -> Tensor:
        """What the last `T = q.shape[1]` of the tokens read of all of them and of `x.initial_state`, `[B, T, H, V]`.

        `occupied [B, L]` says which levels hold something; None if that is not known.
        """
        o, _ = self.forward(with_silent_queries(x), scale, False)
        return o[:, x.v.shape[1] - x.q.shape[1] :].contiguous()

    def fold(self, x: Operands, occupied: Tensor | None, merged: bool) -> Tensor:
        """The state after all tokens of `x`, whose levels the last of them names; with `merged`, the one after it.

        `x` has no queries, and its state the levels that its first token sees; `occupied` as for `replay`.
        """
        _, state = self.forward(with_silent_queries(x), 1.0, True)
        return merged_state(state) if merged and is_level_state(state) else state

    @abstractmethod
    def readouts(self) -> ReadoutForm:
        """How it runs per-level readouts."""


class Triton(Implementation):
    """Triton kernels (`kernels/triton/`)."""

    name, title = "triton", "Triton kernels"
    devices = ("cuda",)  # and ROCm's, which torch calls by that name

    def reason(self, d: Described, device: torch.device) -> str | None:
        """As `limits.unsupported`."""
        from llcompile.kernels.triton.limits import unsupported

        return unsupported(d, device)

    def rejection(self, d: Described, device: torch.device, sweep: Sweep) -> str | None:
        """As `acceptance` finds it."""
        from llcompile.kernels.triton.acceptance import rejection

        return rejection(self, ATEN, d, device, sweep)

    def watched(self, d: Described, device: torch.device, sweep: Sweep) -> contextlib.AbstractContextManager[None]:
        """With the test of launch parameters that are picked meanwhile (`autotune`)."""
        from llcompile.kernels.triton.acceptance import picks_tested

        return picks_tested(self, ATEN, d, device, sweep)

    def refusal(self, error: Exception, d: Described, device: torch.device) -> str | None:
        """Of what Triton raises for kernels that it cannot make."""
        from llcompile.kernels.triton.limits import refusals

        return (
            f"Triton cannot compile them for {d} on {device}: {_line(error)}" if isinstance(error, refusals()) else None
        )

    def forward(self, x: Operands, scale: float, return_final_state: bool) -> tuple[Tensor, Tensor]:
        """On the device of the operands, which must be current for Triton."""
        from llcompile.kernels.triton import segments

        with self.current(x.v):
            return segments.forward(x, scale, return_final_state, _Tests(self, x.v.device))

    def backward(self, x: Operands, scale: float, grad_o: Tensor, grad_state: Tensor | None) -> list[Tensor | None]:
        """Likewise."""
        from llcompile.kernels.triton import segments

        with self.current(x.v):
            return segments.backward(x, scale, grad_o, grad_state, _Tests(self, x.v.device))

    def current(self, x: Tensor) -> contextlib.AbstractContextManager[object]:
        """As `limits.current`."""
        return current(x)

    def step(self, token: Token, routing: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Likewise."""
        from llcompile.kernels.triton import step as kernels

        check_positions(token.state, 1, "state")
        with self.current(token.v):
            return kernels.step(token, routing)

    def step_in_place(self, token: Token, routing: Tensor | None = None) -> Tensor:
        """Likewise, but for decays by rates and for states in other memory than the kernels write."""
        from llcompile.kernels.triton import step as kernels

        if token.decay_rate is not None or token.state.dtype != torch.float32 or not token.state.is_contiguous():
            return super().step_in_place(token, routing)
        check_positions(token.state, 1, "state")
        with self.current(token.v):
            return kernels.step_in_place(token, routing)

    def replay(self, x: Operands, occupied: Tensor | None, scale: float) -> Tensor:
        """One token has a kernel, but for decays by rates."""
        from llcompile.kernels.triton import replay as kernels

        if x.q.shape[1] != 1 or x.decay_rate is not None:
            return super().replay(x, occupied, scale)
        with self.current(x.v):
            return kernels.replay(x, occupied, scale)

    def fold(self, x: Operands, occupied: Tensor | None, merged: bool) -> Tensor:
        """Likewise a kernel, but for decays by rates."""
        from llcompile.kernels.triton import replay as kernels

        if x.decay_rate is not None:
            return super().fold(x, occupied, merged)
        with self.current(x.v):
            return kernels.fold(x, occupied, merged)

    def readouts(self) -> ReadoutForm:
        """As `triton.readouts` has them."""
        from llcompile.kernels.triton import readouts

        return readouts


class _Tests(NamedTuple):
    """The tests of kernels that a call takes besides those of its own description (`segments.Tests`)."""

    of: Triton
    device: torch.device

    def rejection(self, d: Description, sweep: Sweep) -> str | None:
        """Why they must not run; None if they may."""
        return self.of.reason(d, self.device) or self.of.rejection(d, self.device, sweep)

    def watched(self, d: Description, sweep: Sweep) -> contextlib.AbstractContextManager[None]:
        """As `Implementation.watched`."""
        return self.of.watched(d, self.device, sweep)


class Cpp(Implementation):
    """C++ kernels (`kernels/cpp/`)."""

    name, title = "cpp", "C++ kernels"
    devices = ("cpu",)

    def reason(self, d: Described, device: torch.device) -> str | None:
        """They run on a CPU, in the dtypes that PyTorch computes in."""
        if device.type != "cpu":
            return f"the operands are on {device}; C++ kernels run on a CPU"
        if d.dtype not in COMPUTE_DTYPES:
            return f"dtype {d.dtype} is not one of {', '.join(map(str, COMPUTE_DTYPES))}"
        return d.without_kernels

    def refusal(self, error: Exception, d: Described, device: torch.device) -> str | None:
        """No compiler, one that fails, or a platform that there are no flags for."""
        return str(error) if isinstance(error, CompilerError) else None

    def forward(self, x: Operands, scale: float, return_final_state: bool) -> tuple[Tensor, Tensor]:
        """What is not finite stays out of earlier outputs, as it does on ATen."""
        from llcompile.kernels.cpp import engine

        return finite.forward(engine.forward, x, scale, return_final_state)

    def backward(self, x: Operands, scale: float, grad_o: Tensor, grad_state: Tensor | None) -> list[Tensor | None]:
        """As the engine does."""
        from llcompile.kernels.cpp import engine

        return engine.backward(x, scale, grad_o, grad_state)

    def step(self, token: Token, routing: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The engine checks positions, in the same pass over the state."""
        from llcompile.kernels.cpp import engine

        return engine.step(token, routing)

    def step_in_place(self, token: Token, routing: Tensor | None = None) -> Tensor:
        """Likewise; in the dtype of sums, and where each head's state is in one piece."""
        from llcompile.kernels.cpp import engine

        if not engine.fits_in_place(token):
            return super().step_in_place(token, routing)
        return engine.step_in_place(token, routing)

    def readouts(self) -> ReadoutForm:
        """As `cpp.readouts` has them."""
        from llcompile.kernels.cpp import readouts

        return readouts


class Aten(Implementation):
    """ATen operations (`kernels/aten/`)."""

    name, title = "aten", "the ATen lowering"

    def forward(self, x: Operands, scale: float, return_final_state: bool) -> tuple[Tensor, Tensor]:
        """What is not finite stays out of earlier outputs, on a CPU."""
        from llcompile.kernels.aten import sequence

        return finite.forward(sequence.forward, x, scale, return_final_state)

    def backward(self, x: Operands, scale: float, grad_o: Tensor, grad_state: Tensor | None) -> list[Tensor | None]:
        """As the lowering does."""
        from llcompile.kernels.aten import sequence

        return sequence.backward(x, scale, grad_o, grad_state)

    def step(self, token: Token, routing: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Positions are checked first."""
        from llcompile.kernels.aten.token import step

        check_positions(token.state, 1, "state")
        o, state = step(token)
        if routing is not None:
            routing_state.write(state, routing)
        return o, state

    def readouts(self) -> ReadoutForm:
        """As `aten.readouts` has them."""
        from llcompile.kernels.aten import readouts

        return readouts


ATEN = Aten()
# In the order in which messages name them.
IMPLEMENTATIONS: dict[str, Implementation] = {row.name: row for row in (Cpp(), Triton(), ATEN)}


@lru_cache(maxsize=64)  # a step takes a few tens of microseconds
def preferred(device: torch.device) -> Implementation:
    """What `auto` takes on a device, if it can run there."""
    return next((row for row in IMPLEMENTATIONS.values() if device.type in row.devices), ATEN)


def _line(error: Exception) -> str:
    """What an error says, in a line: a compiler's listing stands in the exception itself."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[-1][:200]}" if text else type(error).__name__
