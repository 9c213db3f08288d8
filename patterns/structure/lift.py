"""Lift: a token's computation as one function of whole sequences."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from llcompile.patterns.structure.lifted import Lifted, Numbers
from llcompile.patterns.structure.program import Value


def lifted_function(
    live_in: Lifted, finish: Callable[[Tensor], Tensor] = lambda x: x
) -> tuple[Callable[..., Tensor], list[Value]]:
    """A function that computes the live-in [N, ...] from the values it reads, and those values.

    Args:
        live_in: what to compute.
        finish: what to do with it in the end.
    """
    values = bases_of(live_in)

    def lifted(*tensors: Tensor) -> Tensor:
        return finish(_evaluate(live_in, dict(zip(values, tensors, strict=True)), {}))

    return lifted, values


def bases_of(live_in: Lifted) -> list[Value]:
    """The values that a live-in is computed from."""
    bases: dict[Value, None] = {}
    _collect(live_in, bases)
    return list(bases)


def _collect(live_in: Lifted, bases: dict[Value, None]) -> None:
    if live_in.base is not None:
        bases.setdefault(live_in.base[0])
        return
    for leaf in tree_leaves((live_in.args, live_in.kwargs)):
        if isinstance(leaf, Lifted):
            _collect(leaf, bases)
        elif isinstance(leaf, Value):
            _collect_value(leaf, bases)


def _collect_value(value: Value, bases: dict[Value, None]) -> None:
    """A value that is the same for all tokens: a node's, or computed inside of one (a transposed weight)."""
    if value.node is not None or value.op is None:
        bases.setdefault(value)
        return
    for parent in value.op.inputs:
        _collect_value(parent, bases)


def _number_of(value: Value, env: dict[Value, Tensor]) -> Tensor:
    if value not in env:
        assert value.op is not None
        args, kwargs = tree_map(
            lambda a: _number_of(a, env) if isinstance(a, Value) else a, (value.op.args, value.op.kwargs)
        )
        made = [leaf for leaf in tree_leaves(value.op.target(*args, **kwargs)) if isinstance(leaf, Tensor)]
        env.update(zip(value.op.outputs, made, strict=True))
    return env[value]


def _evaluate(live_in: Lifted, env: dict[Value, Tensor], done: dict[Lifted, Tensor]) -> Tensor:
    """The live-in over all tokens, time first."""
    if live_in in done:
        return done[live_in]
    if live_in.base is not None:
        base, dim, width = live_in.base
        made, length = env[base], live_in.count * max(1, width)
        if base.shape[dim] != length:  # a table may have more
            made = made.narrow(dim, 0, length)
        made = made.unflatten(dim, (live_in.count, width)) if width else made
        made = made.movedim(dim, 0)
    elif live_in.made is not None:
        made = live_in.made.listed(live_in.count, live_in.made.device)
    elif (numbers := _own_numbers(live_in)) is not None:
        first = live_in.args[0]
        alike = isinstance(first, Value)
        x = _number_of(first, env).expand(live_in.count, *first.shape) if alike else _evaluate(first, env, done)
        made = _with_numbers(live_in, numbers, x)
    else:
        made = _of_call(live_in, env, done)
    done[live_in] = made
    return made


def _of_call(live_in: Lifted, env: dict[Value, Tensor], done: dict[Lifted, Tensor]) -> Tensor:
    """What an operation makes of one token, for all."""
    assert live_in.op is not None
    target = live_in.op.target
    flat, spec = tree_flatten((live_in.args, live_in.kwargs or {}))
    given = {
        place: _evaluate(leaf, env, done) if isinstance(leaf, Lifted) else _number_of(leaf, env)
        for place, leaf in enumerate(flat)
        if isinstance(leaf, (Lifted, Value))
    }

    def one(*tensors: Tensor) -> Tensor:
        filled = dict(zip(given, tensors, strict=True))
        args, kwargs = tree_unflatten([filled.get(place, leaf) for place, leaf in enumerate(flat)], spec)
        result = target(*args, **kwargs)
        return result if isinstance(result, Tensor) else result[live_in.index]  # type: ignore[no-any-return]

    axes = tuple(0 if isinstance(flat[place], Lifted) else None for place in given)
    return torch.vmap(one, in_dims=axes)(*given.values())  # type: ignore[no-any-return]


def _own_numbers(live_in: Lifted) -> Numbers | None:
    numbers = live_in.args[1] if len(live_in.args) > 1 else None
    return numbers if isinstance(numbers, Numbers) else None


def _with_numbers(live_in: Lifted, numbers: Numbers, x: Tensor) -> Tensor:
    """Arithmetic with a number for each piece, in the precision in which it is done with one number."""
    function = getattr(torch, live_in.op.name)  # type: ignore[union-attr]
    if numbers.single is not None:
        return function(x, numbers.single)  # type: ignore[no-any-return]
    wide = torch.promote_types(x.dtype, torch.float32)
    listed = torch.tensor(numbers.listed(live_in.count), dtype=wide, device=x.device)
    return function(x.to(wide), listed.view(-1, *(1,) * (x.dim() - 1))).to(x.dtype)  # type: ignore[no-any-return]
