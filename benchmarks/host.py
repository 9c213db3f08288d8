"""What one eager call takes of the host's time with the Triton kernels, without a GPU.

    python -m benchmarks.host [--families scalar/delta] [--calls step forward both] [--turns 60] [--json FILE]

All that Python does for a call on a GPU is done, on CPU tensors: operators of torch, look-ups, buffers, and Triton's
way to its launcher, which does nothing here. What the launcher, CUDA's driver and its allocator take is left out. One
thread, 64 tokens, 2 heads, K = V = 128; the least of `turns` means over 50 calls. To compare two commits, take turns.
Calls that are routed begin with per-level readouts of 16 channels, as `python -m benchmarks.routed` has them.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import record
from llcompile import ops
from llcompile.arguments import at_least
from llcompile.kernels import choice, implementations, operands, operators, routing_state
from llcompile.kernels.triton import acceptance
from llcompile.kernels.triton.cost.case import Case, operands_of, token_of

ROUTED = "routed "
CALLS = ("step", "step in place", "forward", "both", f"{ROUTED}step", f"{ROUTED}forward", f"{ROUTED}both")
LEVELS, CHANNELS, REPEATS = 11, 16, 50
_DEVICE = torch.device("cuda", 0)


def main(given: list[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--families", nargs="+", default=["scalar/none", "scalar/delta"], help="default: scalar/none scalar/delta"
    )
    parser.add_argument("--calls", nargs="+", choices=CALLS, default=CALLS, help="default: all")
    parser.add_argument("--turns", type=at_least(1), default=60, help="means of which the least counts (default: 60)")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    args = parser.parse_args(given)
    torch.set_num_threads(1)
    rows = []
    with pretended():
        for family in args.families:
            for call in args.calls:
                microseconds = round(1e6 * least(run_of(family, call), args.turns), 1)
                rows.append({"family": family, "call": call, "microseconds": microseconds})
                print(f"{family:<14}{call:<15}{microseconds:>9.1f} us", flush=True)
    seen = record.environment("cpu")
    print(f"{seen['machine']}, {seen['threads']} threads, {seen['versions']}")
    if args.json is not None:
        record.write(args.json, {"environment": seen, "results": rows})
    return 0


def least(run: Callable[[], object], turns: int) -> float:
    """Seconds of a call: the least of `turns` means. Kernels are compiled before."""
    for _ in range(10):
        run()
    found = []
    for _ in range(turns):
        start = time.perf_counter()
        for _ in range(REPEATS):
            run()
        found.append((time.perf_counter() - start) / REPEATS)
    return min(found)


def run_of(family: str, call: str) -> Callable[[], object]:
    """A call of a public function, or of two where it is routed."""
    case = Case(family, "forward", heads=2, groups=2, length=64, levels=LEVELS)
    routed, kind = call.startswith(ROUTED), call.removeprefix(ROUTED)
    if kind.startswith("step"):
        return torch.no_grad()(_step(case, kind, routed))
    x: dict[str, Any] = {n: t for n, t in operands_of(case, "cpu")._asdict().items() if t is not None}
    routing = {name: torch.ones(*x["v"].shape[:3], CHANNELS, dtype=x["v"].dtype) for name in ("query", "key")}
    calls: list[Callable[..., Any]] = [functools.partial(ops.level_readouts, levels=LEVELS)] if routed else []
    if kind == "forward":
        return torch.no_grad()(lambda: [*(one(**routing) for one in calls), ops.loglinear_attention(**x)])
    leaves: dict[str, Any] = {n: t.requires_grad_() for n, t in x.items()}
    more = {n: t.requires_grad_() for n, t in routing.items()}

    def both() -> None:
        for one in calls:
            readouts, _ = one(**more)
            readouts.backward(readouts.detach())
        o, _ = ops.loglinear_attention(**leaves)
        o.backward(x["v"])

    return both


def _step(case: Case, kind: str, routed: bool) -> Callable[[], object]:
    function: Any = ops.loglinear_attention_step_ if kind == "step in place" else ops.loglinear_attention_step
    token = {n: t for n, t in token_of(case, "cpu")._asdict().items() if t is not None}
    if not routed:
        return lambda: function(**token)
    query = torch.ones(*token["v"].shape[:2], CHANNELS, dtype=token["v"].dtype)

    def run() -> None:
        _, new = ops.level_readouts_step(query, query, token["state"], LEVELS)
        function(**token, routing_state=new)

    return run


# -- a device that is not there ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def pretended() -> Iterator[None]:
    """CPU tensors take the way of a CUDA device to Triton's launcher, whose kernels have passed their test."""
    from triton.runtime import driver

    driver.set_active(_Driver())
    reason = implementations.Triton.reason
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (acceptance, "_known", _Passed()),
            (implementations.Triton, "reason", lambda self, d, device: reason(self, d, _DEVICE)),
            # A GPU's numbers are not looked at.
            (implementations, "check_positions", lambda *_: None),
            (operators, "check_positions", lambda *_: None),
            (routing_state, "check_positions", lambda *_: None),
            (operands, "can_look", lambda x: False),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(choice.use("triton"))
        yield


class _Passed(dict[Any, None]):
    """The test of every kernel has been passed."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: object) -> None:
        return None


class _Launcher:
    """Does what is left of a launch where there is no device: nothing."""

    def __init__(self, *_: object) -> None:
        """Of a compiled kernel."""

    def __call__(self, *_: object) -> None:
        """Launch."""


class _Driver:
    """What Triton asks of a driver, for an H200."""

    launcher_cls = _Launcher

    @property
    def utils(self) -> _Driver:
        return self

    def load_binary(self, *_: object) -> tuple[int, ...]:
        return 1, 2, 32, 0, 1024

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": 232_448, "multiprocessor_count": 132}

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cuda

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


if __name__ == "__main__":
    sys.exit(main())
