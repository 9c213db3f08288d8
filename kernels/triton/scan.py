"""The operator with decays by rates (Mamba-1): heads in their thousands with a value or a few each, token by token.

A state of K numbers a head has no use for products of matrices, and decays for every token, head and channel would be
K times as large as all operands together. So programs have neighbouring heads, keep the states of all levels in
registers and make decays as they go. A single token is a sequence of one.

Gradients need no states of the past: going forwards, a rate's gradient comes from the states' derivatives by the rates,
which decay and merge as the states do; going backwards, only the gradient of the states is carried. What a log decay
takes part in is what later queries take of the states less what later keys gave to them (as in `chunk_gradient`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from llcompile.kernels.description import describe
from llcompile.kernels.operands import Operands, Token
from llcompile.kernels.state import in_kind_of, in_levels
from llcompile.kernels.triton import autotune, memory
from llcompile.kernels.triton.buffers import Arguments, operand_arguments
from llcompile.kernels.triton.chips import chip_of
from llcompile.kernels.triton.description import Description
from llcompile.kernels.triton.launch import Launch, kernels_of

# The kernels of a pass that reads, and of one that makes gradients.
READ, WRITE = ("rate_scan",), ("rate_read_gradient", "rate_write_gradient")


def forward(x: Operands, scale: float, return_final_state: bool) -> tuple[Tensor, Tensor]:
    """As `engine.forward`."""
    call = Scan(x, scale, return_final_state)
    call.run(READ)
    found = call.arguments
    return found["outputs"], found["end_states"] if return_final_state else x.v.new_empty(0, dtype=torch.float32)


def backward(x: Operands, scale: float, grad_o: Tensor, grad_state: Tensor | None) -> list[Tensor | None]:
    """As `engine.backward`."""
    call = Scan(x, scale, grad_state is not None)
    call.arguments |= operand_arguments("output_gradient", grad_o, x.v.shape)
    if grad_state is not None:
        call.arguments["end_gradients"] = grad_state.float().contiguous()
    call.run(WRITE)
    found = call.arguments
    w = x.level_weights
    q, k = (_over(found[name].unflatten(2, (x.q.shape[2], -1)), 3) for name in ("query_parts", "key_parts"))
    dw = None if w is None else _over(found["weight_parts"].unflatten(2, (w.shape[2], -1)), 3)
    g = _over(found["decay_parts"], 3)
    if x.log_decay is not None and x.log_decay.dim() == 1:
        g = g.sum((0, 1))
    rate = _over(_over(found["rate_gradients"], 2), 0)
    state = None if x.initial_state is None else in_kind_of(x.initial_state, found["begin_gradients"])
    return [q, k, found["value_gradients"], dw, g, rate, None, None, None, state]


def step(token: Token) -> tuple[Tensor, Tensor]:
    """As `aten.token.step`."""
    w, g = token.level_weights, token.log_decay
    one = Operands(
        token.q[:, None],
        token.k[:, None],
        token.v[:, None],
        None if w is None else w[:, None],
        g if g is None or g.dim() == 1 else g[:, None],
        token.decay_rate,
        initial_state=token.state,
    )
    o, state = forward(one, token.scale, True)
    return o[:, 0], state


class Scan:
    """One call: its arguments, and its launches."""

    def __init__(self, x: Operands, scale: float, final_state: bool) -> None:
        old = x.initial_state
        if old is not None:
            w = x.level_weights
            old = in_levels(old.float(), None if w is None else w.shape[-1]).contiguous()
            x = x._replace(initial_state=old)
        self.x, self.d = x, Description.of(describe(x, final_state))
        self.kernels = kernels_of(self.d, chip_of(x.v.device))
        self.share = _share(x)
        self.lanes = self.share * x.v.shape[3]
        self.arguments = Arguments(self.d, self._sizes(), x.lengths is not None, x.v.device)
        self._add_operands(scale)
        self._add_geometry()
        if old is not None:
            self.arguments["begin_states"] = old

    def run(self, kernels: Sequence[str]) -> None:
        """Launch `kernels`, a program for each tile of the values of a unit; raises `KernelMemoryError` before that."""
        memory.check(self.x, self.arguments, self.kernels, kernels)
        programs = self.x.rows * self._units()
        autotune.run_all(Launch(self.kernels[name], self.arguments, programs, self.lanes) for name in kernels)

    def _units(self) -> int:
        return self.x.v.shape[2] // self.share

    def _sizes(self) -> dict[str, int]:
        (batch, tokens, heads, value_dim), levels = self.x.v.shape, self.d.levels or 0
        parts = self._units() * max(-(-self.lanes // self.d.lanes), 1)
        return {
            **{"B": batch, "S": self.x.rows, "T": tokens, "H": heads, "V": value_dim, "K": self.d.key_dim},
            **{"L": levels, "1 + L": 1 + levels, "P": parts},
        }

    def _add_operands(self, scale: float) -> None:
        x = self.x
        named = {"query": x.q, "key": x.k, "value": x.v, "weight": x.level_weights, "decay": x.log_decay}
        for name, operand in named.items():
            if operand is not None:
                self.arguments |= operand_arguments(name, operand, x.v.shape)
        assert x.decay_rate is not None
        rate = x.decay_rate if x.decay_rate.stride(1) == 1 else x.decay_rate.contiguous()
        self.arguments |= {"rate_ptr": rate, "rate_head": rate.stride(0), "scale": float(scale)}

    def _add_geometry(self) -> None:
        x, sizes = self.x, self.arguments.sizes
        for name, table in (("lengths", x.lengths), ("starts", x.starts)):
            if table is not None:
                self.arguments[name] = table.to(torch.int32)
        w = x.level_weights
        self.arguments |= {
            **{"heads": sizes["H"], "tokens": sizes["T"], "share": self.share, "parts": sizes["P"]},
            "weight_repeat": 1 if w is None else sizes["H"] // w.shape[2],
        }


def _share(x: Operands) -> int:
    """How many neighbouring heads have one query and key and the same level weights."""
    heads = x.v.shape[2]
    return math.gcd(heads // x.q.shape[2], heads if x.level_weights is None else heads // x.level_weights.shape[2])


def _over(x: Tensor, axis: int) -> Tensor:
    """The sum over an axis; of one number it is that, without a copy."""
    return x.squeeze(axis) if x.shape[axis] == 1 else x.sum(axis)
