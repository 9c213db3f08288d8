"""What the tests of segments run in a process of its own, where Triton's interpreter is on."""

from __future__ import annotations

import contextlib
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from llcompile.kernels.description import Description
from llcompile.kernels.operands import Operands
from llcompile.kernels.triton import engine, segments
from llcompile.kernels.triton.acceptance_passes import Sweep
from llcompile.kernels.triton.segment_call import AlignedCall
from tests.kernels import triton_cases
from tests.kernels.kernel_cases import operands, relative_error
from tests.kernels.triton_cases import SCALE, _definition, _gradients, budget

Results = dict[str, Tensor | None]


def errors(
    case: dict[str, Any],
    tokens: int,
    final: bool = False,
    lengths: list[int] | None = None,
    bounds: list[int] | None = None,
    forget: str | None = None,
) -> dict[str, tuple[float, float, float]]:
    """Of each result: its error by the definition (packed: by the whole call), how far it is from the whole call, and
    the budget of both. With `forget`, "states" or "gradients" are not handed from one segment to the next."""
    x = operands(**case)
    call = Operands(*x.values(), None if lengths is None else torch.tensor(lengths))  # type: ignore[arg-type]
    if bounds is not None:
        ends = torch.tensor(bounds)
        sizes = {"heads": case["heads"], "levels": case["levels"], "state": case["state"], "dtype": case["dtype"]}
        state = operands(1, batch=len(bounds) - 1, **sizes)["initial_state"]  # type: ignore[arg-type]
        call = call._replace(starts=ends[:-1], lengths=ends.diff(), initial_state=state)
    want: Results = {} if bounds is not None else _definition(x, final, lengths)  # type: ignore[assignment]
    whole = _whole(call, final)
    with _forgetful(forget):
        ours = _by(call, final, tokens)
    found = {}
    for name, target in whole.items():
        mine, definition = ours[name], want.get(name)
        assert mine is not None
        assert target is not None
        assert torch.isfinite(mine).all(), name
        assert mine.shape == target.shape, name
        parts = [mine, target, target if definition is None else definition]
        if name in ("state", "initial_state") and mine.dim() == 5:
            assert forget or torch.equal(mine[:, :, 0], target[:, :, 0])
            parts = [t[:, :, 1:] for t in parts]  # positions are large, and must not set the scale
        found[name] = (relative_error(parts[0], parts[2]), relative_error(parts[0], parts[1]), budget(x))
    return found


def accepted(d: Description, sweep: Sweep, broken: bool) -> str | None:
    """What the test before their first use finds wrong with the kernels of ``d``; `broken`: a segment's own bucket is
    not handed on to the next one."""

    def without_own(call: AlignedCall, old: Tensor, own: Tensor, passing: Tensor | None) -> Tensor:
        return plain(call, old, own * 0, passing)

    plain = AlignedCall._slots_after
    with mock.patch.object(AlignedCall, "_slots_after", without_own) if broken else contextlib.nullcontext():
        return triton_cases.accepted(d, sweep)


def same_bits(case: dict[str, Any], tokens: int) -> bool:
    """Whether two passes in segments give the same bits."""
    x = Operands(*operands(**case).values())  # type: ignore[arg-type]
    first, second = _by(x, True, tokens), _by(x, True, tokens)
    return all(torch.equal(a, second[n]) for n, a in first.items())  # type: ignore[arg-type]


def _whole(x: Operands, final: bool) -> Results:
    o, state = engine.forward(x, SCALE, final)
    return _named(x, o, state if final else None, engine.backward(x, SCALE, *_given(o, state if final else None)))


def _by(x: Operands, final: bool, tokens: int) -> Results:
    o, state = segments.forward_by(x, SCALE, final, tokens)
    given = _given(o, state if final else None)
    return _named(x, o, state if final else None, segments.backward_by(x, SCALE, *given, tokens))


def _given(o: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
    grad_o, grad_state = _gradients(o, state)
    return grad_o.to(o.dtype), None if grad_state is None else grad_state.float()


def _named(x: Operands, o: Tensor, state: Tensor | None, grads: list[Tensor | None]) -> Results:
    names = Operands._fields[: len(grads)]
    results = {"o": o, "state": state, **{n: g for n, g in zip(names, grads, strict=True) if getattr(x, n) is not None}}
    return {n: t for n, t in results.items() if t is not None}


def _forgetful(what: str | None) -> contextlib.AbstractContextManager[object]:
    def after(part: segments.Segment, state: Tensor) -> Operands:
        return part.x._replace(initial_state=torch.zeros_like(state))

    def backward(x: Operands, scale: float, grad_o: Tensor, grad: Tensor | None, make: Any) -> list[Tensor | None]:
        return plain(x, scale, grad_o, None if grad is None else torch.zeros_like(grad), make)

    plain = engine.backward
    if what is None:
        return contextlib.nullcontext()
    return mock.patch.object(*((segments, "_after", after) if what == "states" else (engine, "backward", backward)))
