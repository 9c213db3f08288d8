"""The operators as PyTorch sees them: schemas, shape functions and gradients, in the namespace `llcompile`.

Shape functions never look at values and never specialise on batch or length, so one compiled graph serves every
length. Only inputs are saved for the backward pass, which recomputes what it needs. Outputs never alias inputs.

One operator serves whole rows, packed and padded sequences: at most one of `cu_seqlens`, `attention_mask` and
`seq_idx` is given. Running them may need a tensor's value (the ATen lowering reads the longest sequence),
which no compiler has; inside an operator it may be read.

Compile caches hash a graph, in which the operator is only a name. Who calls it in code that others compile says in
`revision` which sources the call was traced with, so that no cache serves an older gradient or schema; nothing else
reads it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from llcompile.kernels import choice, flops, routing_state, spread, torch_operator
from llcompile.kernels.operands import DIFFERENTIABLE, WITH_TOKENS, Operands, Token, weights_per_head
from llcompile.kernels.state import check_positions, check_state, state_dtype
from llcompile.kernels.varlen import flat, in_place

_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? level_weights, Tensor? log_decay, Tensor? decay_rate, Tensor? beta, "
    "Tensor? erase_query, Tensor? erase_key, Tensor? initial_state, float scale, bool return_final_state, "
    'Tensor? cu_seqlens=None, Tensor? attention_mask=None, Tensor? seq_idx=None, str revision=""'
)
_ROUTING = "Tensor? routing_state=None"  # goes into the header of the state that comes out
_TOKEN_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? level_weights, Tensor state, Tensor? log_decay, Tensor? decay_rate, "
    "Tensor? beta, Tensor? erase_query, Tensor? erase_key, float scale, "
    'str revision=""'
)


def _attention(*given: Any) -> tuple[Tensor, Tensor]:
    *inputs, routing = given
    x, scale, return_final_state, v = *_read(inputs), inputs[2]
    if x.initial_state is not None:
        _check_state(x.initial_state, x.rows, x.q, x.v, x.level_weights, "initial_state")
        check_positions(x.initial_state, x.v.shape[1])
    with plain(v):
        o, state = choice.forward(_widened(x), scale, return_final_state)
        if return_final_state and routing is not None:
            routing_state.write(state, routing)
    return o if o.shape == v.shape else o.reshape(v.shape), state


def _attention_backward(grad_o: Tensor, grad_state: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    x, scale, return_final_state = _read(inputs)
    grad_o = grad_o if x.starts is None else flat(grad_o)
    with plain(grad_o):
        found = choice.backward(_widened(x), scale, grad_o, grad_state if return_final_state else None)
    given, grads = inputs[:DIFFERENTIABLE], _of_shared_weights(x, found)
    return tuple(as_input(x, grad, inputs[0]) for x, grad in zip(given, grads, strict=True))


def _attention_step(*inputs: Any) -> tuple[Tensor, Tensor]:
    *operands, _, routing = inputs
    x = Token(*operands)
    x = x._replace(level_weights=weights_per_head(x.level_weights, x.v))
    # Positions are checked by what runs the step.
    _check_state(x.state, x.v.shape[0], x.q, x.v, x.level_weights, "state")
    with plain(x.v):
        return choice.step(x, routing)


def plain(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Without gradients, and without autocast, as operators choose their own dtypes.

    Entering a context that changes nothing takes a tenth of a step's time.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        return _without_autocast(kind)
    return torch.no_grad() if torch.is_grad_enabled() else contextlib.nullcontext()


@contextlib.contextmanager
def _without_autocast(kind: str) -> Iterator[None]:
    with torch.no_grad(), torch.autocast(kind, enabled=False):
        yield


def _read(inputs: Sequence[Any]) -> tuple[Operands, float, bool]:
    """The operands, with the sequences where they are; scale; whether a final state is asked for."""
    *tensors, scale, return_final_state, cu_seqlens, attention_mask, seq_idx, _ = inputs
    return in_place(Operands(*tensors), cu_seqlens, attention_mask, seq_idx), scale, return_final_state


def _widened(x: Operands) -> Operands:
    """With a state that a cache kept in fewer bits in the dtype that states are computed in, and weights per head.

    With rates heads are channels, and weights for each of them would be larger than all other operands.
    """
    state = x.initial_state
    x = x if state is None else x._replace(initial_state=state.to(state_dtype(x.v.dtype)))
    return x if x.decay_rate is not None else x.with_weights_per_head()


def _of_shared_weights(x: Operands, grads: list[Tensor | None]) -> list[Tensor | None]:
    """The gradients with that of the level weights summed over the heads that share them."""
    at, w = Operands._fields.index("level_weights"), x.level_weights
    grad = grads[at]
    if w is None or grad is None or grad.shape[2] == w.shape[2]:
        return grads
    return [*grads[:at], grad.unflatten(2, (w.shape[2], -1)).sum(3), *grads[at + 1 :]]


def _check_state(state: Tensor, rows: int, q: Tensor, v: Tensor, w: Tensor | None, name: str) -> None:
    """A compiled graph learns of a state of another batch only here: its shape function must not compare sizes."""
    levels = None if w is None else w.shape[-1]
    check_state(state, rows, v.shape[-2], q.shape[-1], v.shape[-1], levels, name)


def as_input(x: Tensor | None, grad: Tensor | None, like: Tensor) -> Tensor:
    """A gradient in shape and dtype of its input, contiguous; an empty tensor where there is no input."""
    if x is None:
        return like.new_empty(0)
    if grad is None:
        return x.new_zeros(x.shape)
    grad = grad if grad.dtype == x.dtype else grad.to(x.dtype)  # what changes nothing takes as long to call
    return (grad if grad.shape == x.shape else grad.reshape(x.shape)).contiguous()


def _state_shape(rows: Any, q: Tensor, v: Tensor, w: Tensor | None) -> tuple[Any, ...]:
    """Of a final state: `[B, H, K, V]`, or with level weights `[B, H, 1 + L, K, V]`."""
    levels = () if w is None else (1 + w.shape[-1],)
    return (rows, v.shape[-2], *levels, q.shape[-1], v.shape[-1])


def _attention_shapes(*inputs: Any) -> tuple[Tensor, Tensor]:
    q, _, v, level_weights, *_, return_final_state, cu_seqlens, _, _, _, _ = inputs
    rows = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = _state_shape(rows, q, v, level_weights) if return_final_state else (0,)
    return v.new_empty(v.shape), v.new_empty(shape, dtype=state_dtype(v.dtype))


def _attention_backward_shapes(grad_o: Tensor, grad_state: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(inputs[0].new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs[:DIFFERENTIABLE])


def _attention_step_shapes(*inputs: Any) -> tuple[Tensor, Tensor]:
    q, _, v, level_weights, *_ = inputs
    new_state = v.new_empty(_state_shape(v.shape[0], q, v, level_weights), dtype=state_dtype(v.dtype))
    return v.new_empty(v.shape), new_state


def own(state: Tensor | None) -> Tensor | None:
    """A copy of a state for the backward pass: before it, a cache writes the next state into the memory of this one."""
    return None if state is None else state.clone()


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, state, scale, return_final_state, cu_seqlens, attention_mask, seq_idx, revision, routing = inputs
    ctx.save_for_backward(*tensors, own(state), cu_seqlens, attention_mask, seq_idx)
    ctx.scale, ctx.return_final_state, ctx.revision = scale, return_final_state, revision
    ctx.routing = None if routing is None or not return_final_state else routing.shape
    ctx.spread = spread.current()


def _attention_gradient(ctx: Any, grad_o: Tensor, grad_state: Tensor) -> tuple[Any, ...]:
    *tensors, cu_seqlens, attention_mask, seq_idx = ctx.saved_tensors
    sequences = (cu_seqlens, attention_mask, seq_idx)
    with spread.run_by(ctx.spread):
        grads = torch.ops.llcompile.loglinear_attention_backward.default(
            grad_o, grad_state, *tensors, ctx.scale, ctx.return_final_state, *sequences, revision=ctx.revision
        )
    return (*_present(tensors, grads), None, None, None, None, None, None, _routing_gradient(ctx, grad_state))


def _save_step(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.scale, ctx.revision, routing = inputs
    ctx.routing = None if routing is None else routing.shape
    at = Token._fields.index("state")
    ctx.save_for_backward(*tensors[:at], own(tensors[at]), *tensors[at + 1 :])


def _step_gradient(ctx: Any, grad_o: Tensor, grad_state: Tensor) -> tuple[Any, ...]:
    """A step is the operator on one token, so its gradient is that operator's."""
    token = Token(*ctx.saved_tensors)
    one = Operands(**{name: getattr(token, name) for name in Operands._fields[:WITH_TOKENS]}, initial_state=token.state)
    # A decay per head alone, and rates, have no batch axis to put time behind.
    moved = [i for i, x in enumerate(one[:WITH_TOKENS]) if x is not None and x.dim() > 1 and x is not one.decay_rate]
    longer = [x.unsqueeze(1) if i in moved and x is not None else x for i, x in enumerate(one[:DIFFERENTIABLE])]
    grads = torch.ops.llcompile.loglinear_attention_backward.default(
        grad_o.unsqueeze(1), grad_state, *longer, ctx.scale, True, revision=ctx.revision
    )
    found = [x.squeeze(1) if i in moved else x for i, x in enumerate(_present(longer, grads))]  # type: ignore[union-attr]
    by_name = dict(zip(Operands._fields, found, strict=False))
    by_name["state"] = by_name["initial_state"]
    return (*(by_name[name] for name in Token._fields[:-1]), None, None, _routing_gradient(ctx, grad_state))


def _routing_gradient(ctx: Any, grad_state: Tensor) -> Tensor | None:
    """A routing state stands in the header of the state that came out, and nowhere else."""
    return None if ctx.routing is None else routing_state.gradient(grad_state, *ctx.routing[1:])


def _present(inputs: Any, grads: Any) -> list[Tensor | None]:
    """The gradients of the inputs that there are; None in place of the others' empty ones."""
    return [None if x is None else grad for x, grad in zip(inputs, grads, strict=True)]


_GRADIENTS = ", ".join(["Tensor"] * DIFFERENTIABLE)

torch_operator.define(
    f"loglinear_attention_backward(Tensor grad_o, Tensor grad_state, {_INPUTS}) -> ({_GRADIENTS})",
    _attention_backward,
    _attention_backward_shapes,
)
torch_operator.define(
    f"loglinear_attention({_INPUTS}, {_ROUTING}) -> (Tensor, Tensor)",
    _attention,
    _attention_shapes,
    _save_attention,
    _attention_gradient,
)
torch_operator.define(
    f"loglinear_attention_step({_TOKEN_INPUTS}, {_ROUTING}) -> (Tensor, Tensor)",
    _attention_step,
    _attention_step_shapes,
    _save_step,
    _step_gradient,
)
flops.register()
