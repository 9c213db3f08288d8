"""The passes of a test of kernels (`acceptance`): each with small operands, and with the same numbers in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from llcompile.kernels.description import Description, ReadoutDescription
from llcompile.kernels.operands import DIFFERENTIABLE, Operands, Token
from llcompile.kernels.readouts import Readouts, ReadoutToken
from llcompile.kernels.replay import first_base, without_queries
from llcompile.kernels.state import state_dtype
from llcompile.kernels.triton import acceptance_cases, blocks, segments
from llcompile.kernels.triton import description as triton

Sweep = Literal["forward", "backward", "step", "step in place", "replay", "fold"]
Described = Description | ReadoutDescription
Results = dict[str, Tensor | None]
POSITION = "the position"
_SCALE = 0.7
_NAMES = Operands._fields[:DIFFERENTIABLE]


class Passes(Protocol):
    """What is tested, and what it is compared with: a row of `implementations`."""

    def forward(self, x: Operands, scale: float, return_final_state: bool, /) -> tuple[Tensor, Tensor]:
        """Output and final state."""

    def backward(self, x: Operands, scale: float, grad_o: Tensor, grad_state: Tensor | None, /) -> list[Tensor | None]:
        """Gradients."""

    def step(self, token: Token, /) -> tuple[Tensor, Tensor]:
        """Output and state."""

    def step_in_place(self, token: Token, /) -> Tensor:
        """Output, with the state in place of the one before."""

    def replay(self, x: Operands, occupied: Tensor | None, scale: float, /) -> Tensor:
        """What the last tokens read."""

    def fold(self, x: Operands, occupied: Tensor | None, merged: bool, /) -> Tensor:
        """The state after the last tokens."""

    def readouts(self) -> Any:
        """The same for readouts."""

    def refusal(self, error: Exception, d: Described, device: torch.device, /) -> str | None:
        """What an error says if it means that kernels cannot be made."""


class Case(NamedTuple):
    """One call: what runs it, its operands, and these in float64."""

    run: Callable[[Passes, Any], Results]
    given: Any
    exact: Any

    def __call__(self, who: Passes, operands: Any) -> Results:
        """The results by name; None where there is none."""
        return self.run(who, operands)


def cases(trusted: Passes, d: Described, device: torch.device, sweep: Sweep) -> Iterator[Case]:
    """The calls of one pass; `trusted` makes the states and the shapes of gradients."""
    if isinstance(d, ReadoutDescription):
        return _readouts(trusted, d, device, sweep)
    if sweep in ("replay", "fold"):
        return _replays(trusted, d, device, sweep)
    steps = {"step": _step, "step in place": _step_in_place}
    if sweep in steps:
        return _steps(trusted, d, device, steps[sweep])
    return _sequence(trusted, d, device, sweep)


def _sequence(trusted: Passes, d: Description, device: torch.device, sweep: Sweep) -> Iterator[Case]:
    x = acceptance_cases.moved(acceptance_cases.sequence(d, trusted.forward), device)
    exact = acceptance_cases.in_double(x)

    def forward(who: Passes, x: Operands) -> Results:
        o, state = who.forward(x, _SCALE, d.final_state)
        return {"the output": o, **(_of_state(state) if d.final_state else {})}

    def in_blocks(who: Passes, x: Operands) -> Results:
        with blocks.always():
            return forward(who, x)

    def in_segments(run: Callable[[Passes, Operands], Results]) -> Iterator[Case]:
        """The same call once more, if long ones go in segments whose kernels are those of `d`."""

        def act(who: Passes, x: Operands) -> Results:
            with segments.always(acceptance_cases.SEGMENT):
                return run(who, x)

        if segments.may(d):
            yield Case(act, x, exact)

    if sweep == "forward":
        yield Case(forward, x, exact)
        yield from in_segments(forward)
        if blocks.may(triton.Description.of(d)):
            x = acceptance_cases.moved(acceptance_cases.in_blocks(d), device)
            yield Case(in_blocks, x, acceptance_cases.in_double(x))
        return
    make = torch.Generator().manual_seed(1)
    shapes = (t.shape for t in trusted.forward(exact, _SCALE, d.final_state))
    grad_o, grad_state = (torch.randn(shape, generator=make).to(device) for shape in shapes)
    grad_o = grad_o.to(d.dtype)

    def backward(who: Passes, x: Operands) -> Results:
        of_state = grad_state.to(state_dtype(x.v.dtype)) if d.final_state else None
        found = who.backward(x, _SCALE, grad_o.to(x.v.dtype), of_state)
        return {f"the gradient of {n}": t for n, t, given in zip(_NAMES, found, x, strict=False) if given is not None}

    yield Case(backward, x, exact)
    yield from in_segments(backward)


def _step(who: Passes, token: Token) -> Results:
    o, state = who.step(token._replace(state=token.state.clone()))
    return {"the output": o, **_of_state(state)}


def _step_in_place(who: Passes, token: Token) -> Results:
    token = token._replace(state=token.state.clone())
    return {"the output": who.step_in_place(token), **_of_state(token.state)}


def _steps(
    trusted: Passes, d: Description, device: torch.device, step: Callable[[Passes, Token], Results]
) -> Iterator[Case]:
    """One token after another, each with the state that the one before leaves in float64."""
    tokens = acceptance_cases.tokens(d, trusted.forward)
    state = tokens[0].state.to(device)
    for token in tokens:
        here = acceptance_cases.of_token(token, lambda t: t.to(device))._replace(state=state)
        exact = acceptance_cases.of_token(here, Tensor.double)
        yield Case(step, here, exact)
        state = trusted.step(exact)[1].float()


def _replays(trusted: Passes, d: Description, device: torch.device, sweep: Sweep) -> Iterator[Case]:
    """The last of some tokens, or the state after them: with all levels read, and with those that hold something."""
    x = acceptance_cases.moved(acceptance_cases.replayed(d, trusted.forward), device)
    assert x.initial_state is not None
    base = first_base(x.initial_state)
    x = x._replace(initial_state=base.state)
    for occupied in {id(o): o for o in (None, base.occupied)}.values():

        def replay(who: Passes, x: Operands, occupied: Tensor | None = occupied) -> Results:
            return {"the output": who.replay(x, occupied, _SCALE)}

        def fold(who: Passes, x: Operands, occupied: Tensor | None = occupied) -> Results:
            return _of_state(who.fold(without_queries(x), occupied, occupied is None))

        yield Case(replay if sweep == "replay" else fold, x, acceptance_cases.in_double(x))


def _of_state(state: Tensor) -> Results:
    """Levels and headers apart: positions are large, and must be exact."""
    if state.dim() < 5:
        return {"the state": state}
    return {"the state": state[:, :, 1:], POSITION: state[:, :, 0]}


def _readouts(trusted: Passes, d: ReadoutDescription, device: torch.device, sweep: Sweep) -> Iterator[Case]:
    x = acceptance_cases.readouts(d)
    x = x._replace(query=x.query.to(device), key=x.key.to(device))
    exact = x._replace(query=x.query.double(), key=x.key.double())
    readouts, state = trusted.readouts().forward(exact, True)
    grad = torch.randn(readouts.shape, generator=torch.Generator().manual_seed(1)).to(device)

    def forward(who: Passes, x: Readouts) -> Results:
        return dict(zip(("the readouts", "their state"), who.readouts().forward(x, True), strict=True))

    def backward(who: Passes, x: Readouts) -> Results:
        found = who.readouts().backward(x, grad.to(x.dtype), None)
        return {f"the gradient of {n}": t for n, t in zip(("query", "key"), found, strict=False)}

    def step(who: Passes, token: ReadoutToken) -> Results:
        found = who.readouts().step(token._replace(state=token.state.clone()))
        return dict(zip(("the readouts", "their state"), found, strict=True))

    if sweep != "step":
        yield Case(forward if sweep == "forward" else backward, x, exact)
        return
    for token in acceptance_cases.readout_tokens(x, state.float()):
        yield Case(step, token, ReadoutToken(token.query.double(), token.key.double(), token.state.double(), d.levels))
