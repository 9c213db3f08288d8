"""A test of the very kernels that a call takes, before their numbers are used.

Triton compiles a kernel once for its description, dtype and chip, whatever the lengths (`source`), so a small call runs
the same machine code as a large one. Its results must agree with the ATen form in float64, and be the same bits each
time. What was found is kept on disk (`records`): a process pays for it once, a machine once for each Triton.
"""

from __future__ import annotations

import contextlib
import subprocess
import threading
import traceback
from collections.abc import Mapping

import torch
from torch import Tensor

from llcompile.errors import KernelCacheError, KernelTestError
from llcompile.kernels.triton import autotune, faults, records
from llcompile.kernels.triton.acceptance_passes import POSITION, Described, Passes, Sweep, cases
from llcompile.kernels.triton.launch import Kernel
from llcompile.kernels.triton.limits import interpreted
from llcompile.kernels.triton.toolchain import toolchain_of
from llcompile.kernels.triton.tuning import Tuning

# How far from float64, in units of what the operands' dtype loses (at least the 10 bits of tf32), or of the ATen form's
# own error in that dtype. On an H200 all cases of tests/kernels/test_triton_cuda.py kept to the first.
_UNITS, _LEAST_LOSS = 4.0, 2.0**-10

_testing = threading.RLock()
_known: dict[tuple[Described, torch.device, Sweep], str | None] = {}


def rejection(ours: Passes, trusted: Passes, d: Described, device: torch.device, sweep: Sweep) -> str | None:
    """Why the kernels of `d` must not be used: their test fails, now or on disk; None if they may be.

    Raises:
        KernelCacheError: the folder for generated files cannot be used.
        KernelTestError: the test left the device unusable for this process.
    """
    kind = (d, device, sweep)
    if kind in _known:  # every call of an operator comes here
        return _known[kind]
    if interpreted():  # nothing is compiled
        return None
    with _testing:
        if kind in _known:  # another thread was faster
            return _known[kind]
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return "they have not been tested here, and cannot be while a CUDA graph is captured; call once before"
        with records.kept(records.question(d, device, sweep)) as record:
            passing = None if record.settled else _settle(record, ours, trusted, d, device, sweep, {})
            if passing is not None:
                return passing
            _known[kind] = record.failure
        return _known[kind]


def picks_tested(
    ours: Passes, trusted: Passes, d: Described, device: torch.device, sweep: Sweep
) -> contextlib.AbstractContextManager[None]:
    """Test launch parameters that are picked by measurement inside, in a pass whose defaults were accepted.

    The test is that of the defaults with one kernel launched otherwise; its result has a record of its own.
    """

    def judge(kernel: Kernel, chosen: Tuning) -> str | None:
        asked = records.question(d, device, sweep) | {"kernel": kernel.name, "launch": list(chosen)}
        with _testing, records.kept(asked) as record:
            passing = None if record.settled else _settle(record, ours, trusted, d, device, sweep, {kernel: chosen})
            return passing or record.failure

    return autotune.Judged(judge)


def _settle(
    record: records.Record,
    ours: Passes,
    trusted: Passes,
    d: Described,
    device: torch.device,
    sweep: Sweep,
    launches: Mapping[Kernel, Tuning],
) -> str | None:
    """Run the test and keep what it finds; a reason of this moment alone is returned instead.

    Kernels are launched with `launches`, or else their defaults.
    """
    with torch.inference_mode(False), torch.no_grad(), autotune.fixed(launches) as ran:
        try:
            found = test(ours, trusted, d, device, sweep)
            missed = next((kernel.name for kernel in launches if kernel not in ran), None)
            if found is None and missed is not None:
                found = f"it does not run {missed}"
            record.settle(found)
        except torch.OutOfMemoryError as error:
            return f"there is no memory to test them ({_line(error)})"
        except Exception as error:
            if isinstance(error, KernelCacheError) or ours.refusal(error, d, device) is not None:
                raise
            if _of_the_machine(error):
                record.failure = f"they could not be tested here: {type(error).__name__}: {_line(error)}"
                return None
            record.settle(f"{type(error).__name__}: {_line(error)}")
            _check_device(device, record, error)
    return None


def _of_the_machine(error: BaseException) -> bool:
    """Whether what Triton needs is missing, which says nothing of a kernel and can be mended: files that cannot be
    written, or a C compiler for its launchers. It is remembered for this process, and not kept on disk.
    """
    frames = traceback.walk_tb(error.__traceback__)
    builds = any(frame.f_globals.get("__name__") == "triton.runtime.build" for frame, _ in frames)
    return builds or isinstance(error, (OSError, subprocess.SubprocessError))


def test(ours: Passes, trusted: Passes, d: Described, device: torch.device, sweep: Sweep) -> str | None:
    """Run the kernels of `d` on small operands; what is wrong, in a sentence, or None."""
    runs = faults.repeats(toolchain_of(device))
    for case in cases(trusted, d, device, sweep):
        wanted, rounded, first = case(trusted, case.exact), case(trusted, case.given), case(ours, case.given)
        again = [case(ours, case.given) for _ in range(runs - 1)]
        for name, want in wanted.items():
            if want is None:
                continue
            wrong = _compare(name, first[name], rounded[name], want, d.dtype)
            if wrong is None and not all(_same(first[name], other[name]) for other in again):
                wrong = f"{name} differs from run to run"
            if wrong is not None:
                return wrong
    return None


def _compare(name: str, found: Tensor | None, rounded: Tensor | None, want: Tensor, dtype: torch.dtype) -> str | None:
    """What is wrong with `found`, which should be `want`; `rounded` is what the operands' dtype allows."""
    if found is None:
        return f"{name} is missing"
    if found.numel() != want.numel():
        return f"{name} has shape {list(found.shape)}; expected {list(want.shape)}"
    if not want.numel():
        return None
    if name == POSITION:
        return None if torch.equal(found.double(), want) else f"{name} in the header of the state is wrong"
    if not bool(torch.isfinite(found).all()):
        return f"{name} is not finite"
    error, own = (_error(t, want) for t in (found, want if rounded is None else rounded))
    allowed = _UNITS * max(torch.finfo(dtype).eps, _LEAST_LOSS, own if own < 1 else 0.0)
    if error <= allowed:
        return None
    return f"{name} differs from the ATen form in float64 by {error:.1e} of its largest value; {allowed:.1e} is allowed"


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and torch.equal(a, b)


def _error(found: Tensor, want: Tensor) -> float:
    largest = want.abs().max().clamp(min=1e-30)
    return float((found.double().reshape(want.shape) - want).abs().max() / largest)


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def _check_device(device: torch.device, record: records.Record, error: Exception) -> None:
    """After an illegal access nothing more runs in this process, ATen neither: say so now, and not in its next call."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except Exception:
        raise KernelTestError(
            f"a test of generated kernels on {device} failed ({_line(error)}) and left the device unusable for this "
            f"process. The result is kept in {record.path}: start the program again, and the ATen lowering is used "
            "where these kernels were"
        ) from error
