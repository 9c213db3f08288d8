"""The operator's passes in C++, as `aten.sequence` and `aten.token` have them on ATen."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from llcompile.errors import KernelError
from llcompile.kernels import header, routing_state
from llcompile.kernels.cpp.call import OPERANDS, Call, Step, operand, pointer, token_operand
from llcompile.kernels.cpp.family import functions
from llcompile.kernels.cpp.gradients import Gradients, for_tokens
from llcompile.kernels.description import Description, describe, describe_step
from llcompile.kernels.operands import WITH_TOKENS, Operands, Token
from llcompile.kernels.state import check_positions, in_levels, is_level_state, linear_state, position_of, state_dtype

# Bytes of states that a thread keeps in a backward pass; beyond that, states are computed once more from checkpoints.
KEPT = 128 << 20
# The fewest tokens of a segment: a sequence is cut where heads are fewer than threads, at half the work once more.
SEGMENT = 1024


def forward(x: Operands, scale: float, return_final_state: bool) -> tuple[Tensor, Tensor]:
    """Output `[B, T, H, V]` and final state (an empty tensor when not asked for)."""
    run = _Run(x, scale)
    o = for_tokens(x, x.v.shape, x.v.dtype)
    final, states = run.final_state() if return_final_state else (run.no_state(), None)
    run.call(describe(x, return_final_state), "forward", output=operand(o), **run.final_fields(states))
    return o, final


def backward(x: Operands, scale: float, grad_o: Tensor, grad_state: Tensor | None) -> list[Tensor | None]:
    """Gradients of the differentiable operands; None where there is no operand."""
    run = _Run(x, scale)
    d = describe(x, grad_state is not None)
    gradients = Gradients(x, d, run.dtype)
    d_initial = None if run.initial is None else torch.empty(run.initial.shape, dtype=run.dtype)
    fields = gradients.fields() | {"output": operand(grad_o), "initial_gradient": pointer(d_initial)}
    run.call(d, "backward", **fields, **run.final_fields(run.final_gradient(grad_state)))
    return [*gradients.summed(), run.initial_gradient(d_initial)]


def step(token: Token, routing: Tensor | None) -> tuple[Tensor, Tensor]:
    """Absorb one token and read out, as `Implementation.step`; raises as that."""
    state, dtype = token.state, state_dtype(token.v.dtype)
    w = token.level_weights
    given = in_levels(state if state.dtype == dtype else state.to(dtype), None if w is None else w.shape[-1])
    given = given if given[0, 0].is_contiguous() else given.contiguous()
    new = torch.empty(given.shape, dtype=dtype)
    if not token.v.numel():
        return token.v.new_empty(token.v.shape), new.copy_(given)
    return _step(token, given, new, routing), new


def fits_in_place(token: Token) -> bool:
    """Whether `step_in_place` serves the state: as C++ has it, each head in one piece, none in another's memory."""
    state = token.state
    area = math.prod(state.shape[2:])
    apart = state.stride(1) >= area and state.stride(0) >= state.stride(1) * (state.shape[1] - 1) + area
    as_computed = token.v.numel() > 0 and state.dtype == state_dtype(token.v.dtype)
    return as_computed and apart and state[0, 0].is_contiguous()


def step_in_place(token: Token, routing: Tensor | None) -> Tensor:
    """The output of `step`, with the new state in place of the old one, which `fits_in_place`; raises as `step`."""
    return _step(token, token.state, token.state, routing)


def _step(token: Token, given: Tensor, new: Tensor, routing: Tensor | None) -> Tensor:
    q, k, v, w, _, log_decay, rate, *others, scale = token
    d, o = describe_step(token), torch.empty(v.shape, dtype=v.dtype)
    rates = operand(rate)  # for all rows
    operands = (*map(token_operand, (q, k, v, w, log_decay)), rates, *map(token_operand, (*others, o)))
    sizes = (v.shape[0], v.shape[1], q.shape[1], q.shape[2], v.shape[2], d.levels or 1, d.levels is not None)
    shares = (1, 0, 0)
    if routing is not None:
        shares, routing = routing_state.shares(new, routing), routing.to(new.dtype).contiguous()
    pointers = map(pointer, (given, new, routing))
    call = Step(*operands, *pointers, *given.stride()[:2], *new.stride()[:2], *shares, *sizes, scale)
    result = functions(d).step(call)
    if result < 0:
        check_positions(given, 1, "state")
    if result:
        raise KernelError(f"the C++ step of {d} failed with code {result}: no memory was left; use a smaller batch")
    return o


class _Run:
    """One call: what both passes have in common."""

    def __init__(self, x: Operands, scale: float) -> None:
        self.x, self.scale = x, scale
        self.dtype = state_dtype(x.v.dtype)
        self.weighted = x.level_weights is not None
        self.slots = 1 if x.level_weights is None else x.level_weights.shape[-1]
        self.sequences = x.rows
        self.kept: list[Tensor] = []  # what pointers point to
        self.initial, self.positions = self._initial()

    def _initial(self) -> tuple[Tensor | None, Tensor | None]:
        """The states `[S, H, slots, K, V]` that sequences start from, and the positions `[S]` of level states."""
        s = self.x.initial_state
        if s is None:
            return None, None
        if not self.weighted:
            return linear_state(s.to(self.dtype))[:, :, None].contiguous(), None
        position = position_of(s) if is_level_state(s) else None
        return in_levels(s.to(self.dtype), self.slots)[:, :, 1:].contiguous(), position

    def final_state(self) -> tuple[Tensor, Tensor]:
        """Memory for the final state, and the part of it that C++ writes, `[S, H, slots, K, V]`."""
        x = self.x
        levels = (1 + self.slots,) if self.weighted else ()
        final = torch.empty(self.sequences, x.v.shape[2], *levels, x.q.shape[3], x.v.shape[3], dtype=self.dtype)
        if not self.weighted:
            return final, final[:, :, None]
        position = torch.full((self.sequences,), x.v.shape[1]) if x.lengths is None else x.lengths
        position = position if self.positions is None else position + self.positions
        final[:, :, 0] = header.write(position, x.q.shape[3], x.v.shape[3], self.dtype)[:, None]
        return final, final[:, :, 1:]

    def final_gradient(self, d: Tensor | None) -> Tensor | None:
        """The part of a final state's gradient that C++ reads, `[S, H, slots, K, V]`."""
        if d is None:
            return None
        d = d.to(self.dtype).contiguous()
        return d[:, :, 1:] if self.weighted else d[:, :, None]

    def no_state(self) -> Tensor:
        """What stands for a final state that was not asked for."""
        return self.x.v.new_empty(0, dtype=self.dtype)

    def final_fields(self, states: Tensor | None) -> dict[str, Any]:
        """Fields of a final state or its gradient `[S, H, slots, K, V]`."""
        if states is None:
            return {}
        self.kept.append(states)
        return {"final_state": states.data_ptr(), "final_row": states.stride(0), "final_head": states.stride(1)}

    def initial_gradient(self, d: Tensor | None) -> Tensor | None:
        """Gradient of the initial state in its own kind, from that of `[S, H, slots, K, V]`."""
        s = self.x.initial_state
        if d is None or s is None:
            return None
        if not is_level_state(s):
            return d[:, :, -1]
        if self.weighted:
            return torch.cat([torch.zeros_like(d[:, :, :1]), d], 2)
        d = d.expand(-1, -1, s.shape[2] - 1, -1, -1)
        return torch.cat([torch.zeros_like(d[:, :, :1]), d], 2)

    def call(self, d: Description, name: str, **fields: Any) -> None:
        """Run an entry point; raises `KernelError` where it ran out of memory."""
        x = self.x
        tables = [None if t is None else t.to(torch.int64).contiguous() for t in (x.starts, x.lengths, self.positions)]
        if not x.v.shape[2] or not self.sequences:
            return
        call = Call(
            **dict(zip(OPERANDS, map(operand, x[:WITH_TOKENS]), strict=True)),  # type: ignore[arg-type]
            **dict(zip(("starts", "lengths", "positions"), map(pointer, tables), strict=True)),
            **{"sequences": self.sequences, "tokens": x.v.shape[1], "heads": x.v.shape[2], "groups": x.q.shape[2]},
            **{"key_dim": x.q.shape[3], "value_dim": x.v.shape[3], "slots": self.slots, "weighted": self.weighted},
            **{"weight_heads": 0 if x.level_weights is None else x.level_weights.shape[2]},
            **self._initial_fields(),
            **{"segments": self._segments(), "parts": 1, "kept": KEPT, "scale": self.scale} | fields,
        )
        if getattr(functions(d), name)(call):
            raise KernelError(f"the C++ {name} of {d} ran out of memory; use a smaller batch or a shorter sequence")

    def _segments(self) -> int:
        """How many segments of each sequence threads work on at once."""
        _, tokens, heads, _ = self.x.v.shape
        return max(min(torch.get_num_threads() // (self.sequences * heads), tokens // SEGMENT), 1)

    def _initial_fields(self) -> dict[str, Any]:
        if self.initial is None:
            return {}
        row, head, *_ = self.initial.stride()
        return {"initial": self.initial.data_ptr(), "initial_row": row, "initial_head": head}
