"""Decompositions: llcompile's operators as ATen operations, for programs that run where llcompile is not installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llcompile import ops as _ops  # noqa: F401  (registers the operators)
from llcompile.errors import DecompositionError
from llcompile.kernels import routing_state
from llcompile.kernels.aten import readouts, sequence, token
from llcompile.kernels.operands import DIFFERENTIABLE, Operands, Token, weights_per_head
from llcompile.kernels.readouts import Readouts, ReadoutToken
from llcompile.kernels.state import is_level_state, state_dtype

_SEQUENCES = ("cu_seqlens", "attention_mask", "seq_idx")
_ELSE = "or install llcompile where the program runs and leave out the decomposition"


def decompositions() -> dict[Any, Callable[..., Any]]:
    """A table for `torch.export.ExportedProgram.run_decompositions`: torch's default one, and llcompile's operators.

    The decomposed program runs without llcompile: as an AOTInductor package, as ONNX, or in another process. It is the
    ATen form of the operators, O(T log T) like the kernels but slower, at the one length that it was exported for.

    Raises (when the table is used):
        DecompositionError: the length is symbolic, the program has packed or padded sequences, or it continues a level
            state with more than one token.
    """
    table: dict[Any, Callable[..., Any]] = dict(torch.export.default_decompositions())
    table[torch.ops.llcompile.loglinear_attention.default] = _attention
    table[torch.ops.llcompile.loglinear_attention_step.default] = _step
    table[torch.ops.aten.linalg_solve_triangular.default] = _solve
    table[torch.ops.llcompile.level_readouts.default] = _readouts
    table[torch.ops.llcompile.level_readouts_step.default] = _readouts_step
    return table


def _attention(*given: Any, **named: Any) -> tuple[Tensor, Tensor]:
    arguments = _arguments(torch.ops.llcompile.loglinear_attention.default, given, named)
    x = Operands(*list(arguments.values())[:DIFFERENTIABLE])
    continues = x.initial_state is not None and is_level_state(x.initial_state) and x.level_weights is not None
    _expect_one_length(f"an operator on values {list(x.v.shape)}", x.v.shape[1], arguments, continues)
    state = x.initial_state
    x = x if state is None else x._replace(initial_state=state.to(state_dtype(x.v.dtype)))
    o, final = sequence.forward(x, arguments["scale"], arguments["return_final_state"])
    return o, _with_routing(final, arguments["routing_state"] if arguments["return_final_state"] else None)


def _step(*given: Any, **named: Any) -> tuple[Tensor, Tensor]:
    arguments = _arguments(torch.ops.llcompile.loglinear_attention_step.default, given, named)
    x = Token(*(arguments[name] for name in Token._fields))
    o, state = token.step(x._replace(level_weights=weights_per_head(x.level_weights, x.v)))
    return o, _with_routing(state, arguments["routing_state"])


def _with_routing(state: Tensor, routing: Tensor | None) -> Tensor:
    return state if routing is None else routing_state.written(state, routing)


def _readouts(*given: Any, **named: Any) -> tuple[Tensor, Tensor]:
    arguments = _arguments(torch.ops.llcompile.level_readouts.default, given, named)
    x = Readouts(*(arguments[name] for name in ("query", "key", "levels", "initial_state")))
    call = f"per-level readouts of queries {list(x.query.shape)}"
    _expect_one_length(call, x.query.shape[1], arguments, x.initial_state is not None)
    return readouts.forward(x, arguments["return_final_state"])


def _readouts_step(query: Tensor, key: Tensor, state: Tensor, levels: int, *_: Any, **named: Any) -> Any:
    return readouts.absorb(ReadoutToken(query, key, state, levels))


def _solve(a: Tensor, b: Tensor, *, upper: bool, left: bool = True, unitriangular: bool = False) -> Any:
    """The solves of the delta rule's chunks as products, for ONNX, which has no solve; others stay as they are."""
    size: Any = a.shape[-1]
    if not (left and unitriangular and isinstance(size, int) and size.bit_count() == 1):
        return NotImplemented
    return _inverse(a.mT).mT @ b if upper else _inverse(a) @ b


def _inverse(lower: Tensor) -> Tensor:
    """Of unit lower triangles [..., N, N], N a power of two: by halves, as stable as substitution is."""
    *batch, size, _ = lower.shape
    made = lower.new_ones(*batch, size, 1, 1)  # of the blocks [..., N / s, s, s] on the diagonal
    for s in (1 << i for i in range(size.bit_length() - 1)):
        pairs = (
            lower.unflatten(-1, (-1, 2 * s)).unflatten(-3, (-1, 2 * s)).diagonal(0, -4, -2)
        )  # [..., 2 s, 2 s, N / 2 s]
        corner = pairs.movedim(-1, -3)[..., s:, :s]
        first, last = made.unflatten(-3, (-1, 2)).unbind(-3)
        below = torch.cat([-last @ corner @ first, last], -1)
        made = torch.cat([torch.nn.functional.pad(first, (0, s)), below], -2)
    return made[..., 0, :, :]


def _arguments(operator: Any, given: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """All arguments by name, in the schema's order, defaults included."""
    schema = operator._schema.arguments
    values = {argument.name: argument.default_value for argument in schema}
    return values | dict(zip(values, given, strict=False)) | named


def _expect_one_length(call: str, length: Any, arguments: dict[str, Any], continues: bool) -> None:
    sequences = [name for name in _SEQUENCES if arguments[name] is not None]
    if sequences:
        raise DecompositionError(
            f"{call} has {' and '.join(sequences)}, which only llcompile's own operator reads. Export the model for "
            f"whole rows (without a mask or packed sequences), {_ELSE}"
        )
    if isinstance(length, torch.SymInt):
        raise DecompositionError(
            f"{call} has a symbolic length, and the number of its levels depends on the length. Export the model for "
            f"one length (no dynamic_shapes for tokens), {_ELSE}"
        )
    if continues:
        raise DecompositionError(
            f"{call} continues a level state, and where its tokens lie in the tree depends on the state's position. "
            f"Export a program that starts without a state, or one for a single token, {_ELSE}"
        )
