"""The passes on ATen operations, of rows or of sequences where they are: those become rows first."""

from __future__ import annotations

from torch import Tensor

from llcompile.kernels.aten import sequence
from llcompile.kernels.operands import Operands
from llcompile.kernels.rows import from_rows, in_rows, rows_of, to_rows


def forward(x: Operands, scale: float, return_final_state: bool) -> tuple[Tensor, Tensor]:
    """As `sequence.forward`."""
    if x.starts is None:
        return sequence.forward(x, scale, return_final_state)
    rows = rows_of(x)
    o, state = sequence.forward(in_rows(x, rows), scale, return_final_state)
    return from_rows(o, rows), state


def backward(x: Operands, scale: float, grad_o: Tensor, grad_state: Tensor | None) -> list[Tensor | None]:
    """As `sequence.backward`. A token stands in one place of the rows: moving back is moving there's adjoint."""
    if x.starts is None:
        return sequence.backward(x, scale, grad_o, grad_state)
    rows = rows_of(x)
    grads = sequence.backward(in_rows(x, rows), scale, to_rows(grad_o, rows), grad_state)
    back = [d if d is None or d.dim() < 3 else from_rows(d, rows) for d in grads[:6]]
    return [*back, grads[6]]
