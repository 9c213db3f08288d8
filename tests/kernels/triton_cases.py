"""What the tests of the Triton kernels run in a process of its own, where Triton's interpreter is on.

The interpreter has to be chosen before Triton is imported, and other tests need Triton without it.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from llcompile.kernels import choice, header
from llcompile.kernels.description import Description
from llcompile.kernels.header import DIGITS
from llcompile.kernels.implementations import ATEN, IMPLEMENTATIONS, Sweep
from llcompile.kernels.operands import Operands
from llcompile.kernels.reference import reference_attention
from llcompile.kernels.replay import first_base, without_queries
from llcompile.kernels.state import is_level_state, merged_state
from llcompile.kernels.triton import acceptance, autotune, blocks, engine, interpreter, launch
from llcompile.kernels.triton.cost.counter import counting
from llcompile.kernels.triton.launch import Launch
from llcompile.kernels.triton.limits import interpreted
from llcompile.kernels.triton.tuning import Tuning
from llcompile.ops import ReplayState, loglinear_attention, loglinear_attention_step, loglinear_attention_step_
from tests.kernels.kernel_cases import Operands as Case
from tests.kernels.kernel_cases import both, operands, relative_error

SCALE = 0.7


if interpreted():
    interpreter.prepare()


def settled() -> bool:
    """Whether this process has the interpreter on."""
    return interpreted()


@contextlib.contextmanager
def _tiles_of_hopper() -> Iterator[None]:
    """Kernels as they are made for sm_90, which is what is assumed where there is no chip."""
    launch.kernels_of.cache_clear()
    with mock.patch.object(launch, "interpreted", return_value=False):
        yield
    launch.kernels_of.cache_clear()


def errors(
    case: dict[str, object],
    final: bool = False,
    lengths: list[int] | None = None,
    poisoned: bool = False,
    hopper: bool = False,
) -> dict[str, tuple[float, float]]:
    """As :func:`_errors`, with the tiles that every chip takes or those that Hopper gets."""
    with _tiles_of_hopper() if hopper else contextlib.nullcontext():
        return _errors(case, final, lengths, poisoned)


def _errors(
    case: dict[str, object], final: bool, lengths: list[int] | None, poisoned: bool
) -> dict[str, tuple[float, float]]:
    """Relative error and its budget, of the output, the final state and every gradient.

    ``case`` are arguments of :func:`kernel_cases.operands`; ``shared`` heads have the same level weights,
    and an erase key without ``factor`` has no beta. The definition runs in float64 on the same operands.
    """
    strong, shared, factor = case.pop("strong", False), case.pop("shared", 1), case.pop("factor", True)
    x = operands(**case)  # type: ignore[arg-type]
    if x["level_weights"] is not None:
        x["level_weights"] = x["level_weights"][:, :, ::shared]  # type: ignore[misc]
    if not factor:
        x["beta"] = None
    if strong:
        _make_decays_strong(x)
    want = _definition(x, final, lengths)
    call = Operands(
        *(_poison(t) if poisoned else t for t in x.values()), None if lengths is None else torch.tensor(lengths)
    )
    o, state = engine.forward(call, SCALE, final)
    grad_o, grad_state = _gradients(want["o"], want.get("state"))
    found = engine.backward(call, SCALE, grad_o.to(o.dtype), None if grad_state is None else grad_state.float())
    ours: dict[str, Tensor | None] = {"o": o, "state": state if final else None, **dict(zip(x, found, strict=True))}
    result = {}
    for name, target in want.items():
        mine = ours[name]
        assert mine is not None, f"{name} is missing"
        assert torch.isfinite(mine).all(), f"{name} is not finite"
        assert mine.shape == target.shape, name
        if name == "state" and mine.dim() == 5:  # the header, which is large, is not to set the scale
            assert torch.equal(mine[:, :, 0].double(), target[:, :, 0])
            mine, target = mine[:, :, 1:], target[:, :, 1:]
        result[name] = (_error(name, mine, target, x, want), budget(x))
    return result


def _error(name: str, ours: Tensor, target: Tensor, x: Case, want: dict[str, Tensor]) -> float:
    """The largest difference by the largest value of the definition.

    One token alone has no state that decays: the gradient of its decay is 0. Kernels with decays per channel take it as
    the difference of `q * dq` and `k * dk`, which are equal there, so that it is measured by those.
    """
    if name == "log_decay" and not target.any():
        assert x["q"] is not None
        return float(ours.abs().max() / (want["q"] * x["q"]).abs().max())
    return relative_error(ours, target)


def budget(x: Case) -> float:
    """What arithmetic in the operands' dtype may lose: 200 roundings in fp32, and two of the operands' dtype.

    The same as for the ATen lowering (test_operator.test_error_budget), though here products are rounded as well.
    """
    assert x["q"] is not None
    return 200 * torch.finfo(torch.float32).eps + 2 * torch.finfo(x["q"].dtype).eps


def _definition(x: Case, final: bool, lengths: list[int] | None) -> dict[str, Tensor]:
    leaves = {n: t if t is None else t.detach().double().requires_grad_() for n, t in x.items()}
    mask = None
    if lengths is not None:
        assert x["v"] is not None
        mask = (torch.arange(x["v"].shape[1]) < torch.tensor(lengths)[:, None]).long()
    o, state = reference_attention(**leaves, scale=SCALE, return_final_state=True, attention_mask=mask)  # type: ignore[arg-type]
    grad_o, grad_state = _gradients(o, state if final else None)
    wanted = {n: t for n, t in leaves.items() if t is not None}
    outputs, gradients = ([o, state], [grad_o, grad_state]) if final else ([o], [grad_o])
    found = torch.autograd.grad(outputs, list(wanted.values()), gradients, allow_unused=True)
    result = {"o": o.detach(), **{n: g for n, g in zip(wanted, found, strict=True) if g is not None}}
    if final:
        assert state is not None
        result["state"] = state.detach()
    return result


def _gradients(o: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
    make = torch.Generator().manual_seed(1)
    grad_o = torch.randn(o.shape, dtype=torch.float64, generator=make).to(torch.bfloat16).double()
    return grad_o, None if state is None else torch.randn(state.shape, dtype=torch.float64, generator=make)


def _make_decays_strong(x: Case) -> None:
    """Decays of 0 and of e^-10000 beside mild ones."""
    g = x["log_decay"]
    assert g is not None
    g[:, 5::7] = -1e4
    g[:, 70:110] = -1e4
    if x["decay_rate"] is None:  # its gradient is -inf times 0 there
        g[:, 3::40] = -torch.inf
        g[:, -5, 0] = -torch.inf


def _poison(x: Tensor | None) -> Tensor | None:
    """The same values as a strided view into a buffer of NaN: what is read beyond an end shows."""
    if x is None:
        return None
    wide = torch.full([n + 3 for n in x.shape], torch.nan, dtype=x.dtype)
    view = wide[tuple(slice(1, n + 1) for n in x.shape)]
    view.copy_(x)
    return view


def same_bits(case: dict[str, object]) -> bool:
    """Whether two runs give bitwise the same gradients."""
    x = Operands(*operands(**case).values(), None)  # type: ignore[arg-type]
    assert x.v is not None
    runs = [engine.backward(x, SCALE, x.v, None) for _ in range(2)]
    return all(a is None or torch.equal(a, b) for a, b in zip(*runs, strict=True))  # type: ignore[arg-type]


def through_the_operator() -> dict[str, float]:
    """Relative differences between implementations of the public function: packed sequences, with gradients."""
    x = operands(100, "token", True, 6, batch=1, groups=1, heads=2, dtype=torch.float32)
    x["initial_state"] = operands(1, batch=3, heads=2, state="linear", dtype=torch.float32)["initial_state"]
    bounds = torch.tensor([0, 30, 30, 100])
    results = []
    for kernels in ("triton", "aten"):
        leaves = {n: t if t is None else t.detach().clone().requires_grad_() for n, t in x.items()}
        with choice.use(kernels):
            o, state = loglinear_attention(**leaves, cu_seqlens=bounds, return_final_state=True)  # type: ignore[arg-type]
            assert state is not None
            wanted = {n: t for n, t in leaves.items() if t is not None}
            grads = torch.autograd.grad(o.square().sum() + state[:, :, 1:].square().sum(), list(wanted.values()))
        results.append({"o": o.detach(), "state": state.detach(), **dict(zip(wanted, grads, strict=True))})
    return {n: relative_error(t, results[1][n]) for n, t in results[0].items()}


def accepted(d: Description, sweep: Sweep) -> str | None:
    """What the test before their first use finds wrong with the kernels of ``d``."""
    return acceptance.test(IMPLEMENTATIONS["triton"], ATEN, d, torch.device("cpu"), sweep)


def packed_errors(
    case: dict[str, object], bounds: list[int] | None, mask: list[list[int]] | None, spoilt: int | None = None
) -> dict[str, tuple[float, float]]:
    """As :func:`errors`, of packed (``bounds``) or padded sequences through the public function, final states and all.

    Every operand of sequence ``spoilt`` of the packed ones is NaN; what is compared is all others'.
    """
    x = operands(**case)  # type: ignore[arg-type]
    keep_tokens, keep_rows = slice(None), slice(None)
    where: dict[str, object] = {"attention_mask": None if mask is None else torch.tensor(mask)}
    if bounds is not None:
        where = {"cu_seqlens": torch.tensor(bounds)}
        state = {"batch": len(bounds) - 1, "dtype": case["dtype"], "heads": case["heads"], "levels": case["levels"]}
        x["initial_state"] = operands(1, state=case.get("state"), **state)["initial_state"]  # type: ignore[arg-type]
    if bounds is not None and spoilt is not None:
        token, row = (torch.arange(n) for n in (bounds[-1], len(bounds) - 1))
        keep_tokens = (token < bounds[spoilt]) | (token >= bounds[spoilt + 1])  # type: ignore[assignment]
        keep_rows = row != spoilt  # type: ignore[assignment]
        for t in x.values():
            if t is not None and t.shape[0] == 1:
                t[:, ~keep_tokens] = torch.nan  # type: ignore[operator]
    found = {}
    with choice.use("triton"):
        for name, (ours, want) in both(x, SCALE, **where).items():
            if name in ("state", "initial_state"):
                ours, want = ours[keep_rows], want[keep_rows]
                if ours.dim() == 5:
                    assert torch.equal(ours[:, :, 0].double(), want[:, :, 0])
                    ours, want = ours[:, :, 1:], want[:, :, 1:]
            elif ours.dim() > 2:
                ours, want = ours[:, keep_tokens], want[:, keep_tokens]
            assert torch.isfinite(ours).all(), f"{name} is not finite"
            found[name] = (relative_error(ours, want), budget(x))
    return found


def step_differences(case: dict[str, object], steps: int) -> list[float]:
    """Relative differences of outputs and states between implementations, decoding ``steps`` tokens one by one.

    In place, too, with numbers in the header that are none of the position's.
    """
    x = operands(length=steps, **case)  # type: ignore[arg-type]
    state = x.pop("initial_state")
    assert state is not None
    found = []
    for t in range(steps):
        token = {n: a if a is None or a.dim() < 3 else a[:, t] for n, a in x.items()}
        results, before = [], state
        for kernels in ("triton", "aten"):
            with choice.use(kernels):
                results.append(loglinear_attention_step(**token, state=state, scale=SCALE))  # type: ignore[arg-type]
        (o, state), (want, want_state) = results
        found += [relative_error(o, want), relative_error(state, want_state)]
        if is_level_state(before) == is_level_state(state):
            changed = before.clone()
            if is_level_state(before):
                changed.flatten(3)[:, :, 0, DIGITS:] = rest = torch.full_like(changed.flatten(3)[:, :, 0, DIGITS:], 0.5)
            with choice.use("triton"):
                o = loglinear_attention_step_(**token, state=changed, scale=SCALE)  # type: ignore[arg-type]
            if is_level_state(before):
                assert torch.equal(changed.flatten(3)[:, :, 0, DIGITS:], rest)
                changed.flatten(3)[:, :, 0, DIGITS:] = 0
            found += [relative_error(o, want), relative_error(changed, want_state)]
    return found


class Pretended:
    """A meter without a clock: every candidate runs, twice where it may, and the one asked for is the fastest."""

    def __init__(self, wanted: int, tried: int) -> None:
        self.name = f"the interpreter, for candidate {wanted}"
        self.wanted, self.tried, self.runs = wanted, tried, 0
        self.seen: set[str] = set()
        self._last = False

    def ready(self) -> bool:
        return True

    def refused(self, launch: Launch, chosen: Tuning) -> str | None:
        """All but the default and the one that is wanted, for what interpreting costs."""
        self.seen.add(launch.kernel.name)
        found = autotune.candidates(launch.kernel)
        wanted = found[self.wanted % len(found)]
        self._last = chosen == wanted
        return None if chosen in (wanted, launch.kernel.default) else "not of this test"

    def spilled(self, launch: Launch, chosen: Tuning) -> int:
        return 0

    def milliseconds(self, run: Any) -> float:
        for _ in range(self.tried):
            run()
        self.runs += self.tried
        return 0.0 if self._last else 1.0


def tuned_errors(
    case: dict[str, object], final: bool, wanted: int, tried: int = 2
) -> tuple[dict[str, tuple[float, float]], int, list[str]]:
    """As :func:`errors` while every launch is tuned; with how many runs there were for that, and of which kernels."""
    meter = Pretended(wanted, tried)
    with mock.patch.object(autotune, "current_meter", return_value=meter):
        found = errors(case, final)
    return found, meter.runs, sorted(meter.seen)


def errors_in_blocks(case: dict[str, object], lengths: list[int] | None, walk: int) -> tuple[float, float, float]:
    """The output by blocks of `walk` chunks: its error, the budget, and how far it is from that by chunks alone."""
    x = operands(**case)  # type: ignore[arg-type]
    want = _definition(x, False, lengths)["o"]
    call = Operands(*(_poison(t) for t in x.values()), None if lengths is None else torch.tensor(lengths))
    with mock.patch.object(blocks, "WALK", walk):
        found = blocks.forward(call, SCALE)
    by_chunks, _ = engine.forward(call, SCALE, False)
    assert found.shape == want.shape
    assert torch.isfinite(found).all()
    return relative_error(found, want), budget(x), relative_error(found, by_chunks.double())


def replay_errors(case: dict[str, object], calls: list[int], window: int, chunk: int) -> list[float]:
    """Relative errors of what a replayed state reads against the definition."""
    x = operands(length=sum(calls), **case)  # type: ignore[arg-type]
    state = x.pop("initial_state")
    assert state is not None
    wide = {n: t if t is None else t.double() for n, t in x.items()}
    want, _ = reference_attention(**wide, initial_state=state.double(), scale=SCALE)  # type: ignore[arg-type]
    replayed, done, found = ReplayState(state, window, chunk), 0, []
    with choice.use("triton"):
        for count in calls:
            some = {n: t if t is None or t.dim() < 3 else t[:, done : done + count] for n, t in x.items()}
            o = replayed.step(**some, scale=SCALE)  # type: ignore[arg-type]
            found.append(relative_error(o, want[:, done : done + count]))
            done += count
    return found


def fold_errors(case: dict[str, object], tokens: int) -> list[float]:
    """Relative errors of the state after some tokens, levels as the last and as the next one sees them, against the
    definition; a position that is wrong, or levels that hold something elsewhere, are infinite ones."""
    x = Operands(*operands(length=tokens, **case).values())  # type: ignore[arg-type]
    assert x.initial_state is not None
    base, found = first_base(x.initial_state.clone()), []
    given = without_queries(x._replace(initial_state=base.state))
    wide = {n: t if t is None else t.double() for n, t in zip(x._fields[:9], x, strict=False)}
    _, last = reference_attention(**wide, initial_state=base.state.double(), scale=SCALE, return_final_state=True)  # type: ignore[arg-type]
    for merged, occupied in itertools.product((False, True), (None, base.occupied)):
        want = merged_state(last) if merged and is_level_state(last) else last
        with choice.use("triton"):
            ours = choice.fold(given, occupied, merged)
        assert ours.shape == want.shape
        if is_level_state(want):
            right = torch.equal(ours[:, :, 0].double(), want[:, :, 0]) and torch.equal(ours.ne(0), want.ne(0))
            ours, want = ours[:, :, 1:], want[:, :, 1:]
            found.append(0.0 if right else float("inf"))
        found.append(relative_error(ours, want))
    return found


def replay_bytes(position: int, tokens: int, levels: int) -> tuple[int, int]:
    """Bytes that a token reads and writes, `tokens` after `position`: gated delta, one head, K = V = 128, bfloat16."""
    x = operands(tokens + 1, "token", True, levels, batch=1, groups=1, heads=1, key_dim=128, value_dim=128,
                 dtype=torch.bfloat16)  # fmt: skip
    del x["initial_state"]
    state = torch.zeros(1, 1, 1 + levels, 128, 128)
    state[:, :, 0] = header.write(torch.tensor([position]), 128, 128, torch.float32)[:, None]
    for level in (0, *(i + 1 for i in range(levels - 1) if (position - 1) >> i & 1)):
        state[:, :, 1 + level] = torch.randn(128, 128)
    replayed = ReplayState(state)
    parts = [{n: t if t is None else t[:, s] for n, t in x.items()} for s in (slice(tokens), slice(tokens, None))]
    with choice.use("aten"):
        replayed.step(**parts[0])  # type: ignore[arg-type]
    with choice.use("triton"), counting(lambda *launch: ()) as launches:
        replayed.step(**parts[1])  # type: ignore[arg-type]
    return launches[0].numbers["read"], launches[0].numbers["written"]
