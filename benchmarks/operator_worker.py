"""One measurement of ``llcompile bench``, in a process of its own."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def main(text: str) -> None:
    """Measure the jobs described by ``text`` (a JSON list) and print one line of JSON for each."""
    jobs = json.loads(text)
    small = {**jobs[0], "length": 128, "compiled": False, "repeats": 1}
    measure(small)  # libraries load and threads start with the first call; that is nobody's memory
    for job in jobs:
        print(json.dumps(measure(job)), flush=True)


def measure(job: dict[str, Any]) -> dict[str, float]:
    """Time and peak memory of one job."""
    operands = _operands(job)
    call = _callable(job, operands)
    run = _backward(call, operands) if job["backward"] else torch.no_grad()(call)
    started = time.perf_counter()
    if job["compiled"]:  # compiling takes memory of its own, which is not what is asked here
        run()
    first = time.perf_counter() - started
    before = resident()
    reset_peak()
    run()
    most = max(peak() - before, 0)
    wall, cpu = repeat(run, job["repeats"])
    return {"seconds": wall, "cpu_seconds": cpu, "compile_seconds": first, "peak_mib": most / 2**20}


def _operands(job: dict[str, Any]) -> dict[str, Tensor]:
    """The same operands for ours and for peers; keys have unit length, as every delta-rule model's have."""
    torch.manual_seed(0)
    b, t, h, k = 1, job["length"], job["heads"], job["dim"]
    shape = (b, t, h)
    unit = torch.nn.functional.normalize
    x = {
        "q": unit(torch.randn(*shape, k), dim=-1),
        "k": unit(torch.randn(*shape, k), dim=-1),
        "v": torch.randn(*shape, k),
    }
    if job["decay"] == "scalar":
        x["log_decay"] = -0.1 * torch.rand(shape) - 1e-4
    if job["decay"] == "channel":
        x["log_decay"] = -0.1 * torch.rand(*shape, k) - 1e-4
    if job["correction"] == "delta":
        x["beta"] = torch.rand(shape)
    if job["weights"]:
        x["level_weights"] = torch.rand(*shape, max(t - 1, 0).bit_length() + 1)
    if job["backward"]:
        x["grad"] = torch.randn(*shape, k)
    x = {name: tensor.to(job["device"]) for name, tensor in x.items()}
    return {n: x[n].requires_grad_(job["backward"] and n != "grad") for n in x}


def _callable(job: dict[str, Any], x: dict[str, Tensor]) -> Callable[[], Tensor]:
    if job["runs"] == "llcompile":
        return _ours(x)
    peer = _mamba2(x) if job["runs"] == "mamba2_chunk_scan" else _gated_delta(x)
    return torch.compile(peer, dynamic=False) if job["compiled"] else peer


def _ours(x: dict[str, Tensor]) -> Callable[[], Tensor]:
    from llcompile.ops import loglinear_attention

    w = x.get("level_weights")
    return lambda: loglinear_attention(x["q"], x["k"], x["v"], w, x.get("log_decay"), x.get("beta"))[0]


def _mamba2(x: dict[str, Tensor]) -> Callable[[], Tensor]:
    """The Mamba-2 scan, its decay being ``A * dt``: A = -1 and dt = -log_decay give ours (with values times dt)."""
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    scan = getattr(mamba2_chunk_scan, "__wrapped__", mamba2_chunk_scan)
    rate = -torch.ones(x["v"].shape[2], device=x["v"].device)
    return lambda: scan(x["v"], -x["log_decay"], rate, x["k"], x["q"], 64)


def _gated_delta(x: dict[str, Tensor]) -> Callable[[], Tensor]:
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    rule = getattr(torch_chunk_gated_delta_rule, "__wrapped__", torch_chunk_gated_delta_rule)
    return lambda: rule(x["q"], x["k"], x["v"], x["log_decay"], x["beta"])[0]


def _backward(call: Callable[[], Tensor], x: dict[str, Tensor]) -> Callable[[], object]:
    leaves = [t for n, t in x.items() if n != "grad"]
    return lambda: torch.autograd.grad(call(), leaves, x["grad"])


def repeat(run: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Smallest wall and CPU seconds of at least ``repeats`` runs (more of quick ones, fewer of very slow ones)."""
    wall, cpu, spent, done = [], [], 0.0, 0
    while done < repeats or (spent < 0.5 and done < 10 * repeats):
        _synchronize()
        a, c = time.perf_counter(), time.process_time()
        run()
        _synchronize()
        wall.append(time.perf_counter() - a)
        cpu.append(time.process_time() - c)
        spent, done = spent + wall[-1], done + 1
        if spent > 60:
            break
    return min(wall), min(cpu)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def resident() -> int:
    """Bytes in use now."""
    gc.collect()
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    with contextlib.suppress(OSError, AttributeError):  # freed memory that malloc still holds would hide what is used
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return _status("VmRSS")


def reset_peak() -> None:
    """Has `peak` start again."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # makes VmHWM start again from the present size


def peak() -> int:
    """The most bytes in use since `reset_peak`."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return _status("VmHWM")


def _status(field: str) -> int:
    """A size in bytes from /proc, or the highest resident size where there is no /proc."""
    path = Path("/proc/self/status")
    if path.exists():
        return next(int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith(field)) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main(sys.argv[1])
