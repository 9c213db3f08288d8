"""One measurement of ``llcompile bench rewrite`` or ``bench recognition``, in a process of its own."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache

from benchmarks.mixers import Quadratic, TokenLoop
from benchmarks.operator_worker import peak, repeat, reset_peak, resident

FITS = 0.9  # of the memory that is free may be taken


class PassTimes(logging.Handler):
    """Adds up the seconds of our passes, from what they log."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.seconds: dict[str, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Takes one line of the log."""
        if str(record.msg).startswith("pass ") and isinstance(record.args, tuple):
            name, _, milliseconds = record.args
            self.seconds[str(name)] = self.seconds.get(str(name), 0.0) + float(str(milliseconds)) / 1e3

    @property
    def look(self) -> float:
        """Seconds until it was known what there is; the rewrite comes after."""
        return sum(seconds for name, seconds in self.seconds.items() if name != "rewrite")


def main(text: str) -> None:
    """Measure the jobs described by ``text`` (a JSON list) and print one line of JSON for each."""
    warnings.simplefilter("ignore")  # level weights come late on purpose
    for job in json.loads(text):
        if job["threads"]:
            torch.set_num_threads(job["threads"])
        try:
            found: dict[str, Any] = rewrite(job) if "backward" in job else recognition(job)
        except (RuntimeError, MemoryError) as error:
            if "allocate" not in str(error) and not isinstance(error, MemoryError):
                raise
            found = {"error": "does not fit"}
        print(json.dumps(found), flush=True)


def rewrite(job: dict[str, Any]) -> dict[str, Any]:
    """Time and peak memory of a hand-written mixer, as it is or compiled."""
    width = job["heads"] * job["dim"]
    torch.manual_seed(0)
    model = Quadratic(width, job["heads"], job["decay"] == "scalar")
    _once(model, torch.randn(1, 64, width))  # libraries load and threads start; that is nobody's memory
    model.zero_grad()
    x = torch.randn(1, job["length"], width, requires_grad=job["backward"])
    y = torch.randn_like(x)
    times = _listen()
    call = _compiled(model, job["form"])
    run = _training(call, model, x, y) if job["backward"] else torch.no_grad()(lambda: call(x))
    _limit_memory()
    first = _first(run)
    if job["form"].startswith("loglinear"):
        first |= {"recognition_seconds": times.look, **_rewritten()}
    before = resident()
    reset_peak()
    run()
    most = max(peak() - before, 0)
    wall, cpu = repeat(run, job["repeats"])
    timed = {"seconds": wall, "cpu_seconds": cpu, "peak_mib": most / 2**20}
    return timed if job["form"] == "eager" else {**timed, **first}


def recognition(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds that our passes take on a model, or that plain Inductor takes to compile it."""
    model, x = _model(job)
    times = _listen()
    inner: dict[str, Any] | None = {"inner": "eager"} if job["form"] == "loglinear" else None
    compiled = torch.compile(model, backend=job["form"], options=inner, dynamic=False)
    run = torch.no_grad()(lambda: compiled(x))
    if job["form"] == "inductor":
        with fresh_cache():
            _once(torch.compile(nn.Linear(3, 3)), torch.randn(2, 3))  # the compiler's own start
            return {**_first(run), "seconds": repeat(run, 1)[0]}
    run()
    return {"recognition_seconds": times.look, "rewrite_seconds": times.seconds.get("rewrite", 0.0), **_counted()}


def _once(model: Callable[..., Tensor], x: Tensor) -> None:
    model(x).sum().backward()


def _listen() -> PassTimes:
    times, log = PassTimes(), logging.getLogger("llcompile")
    log.handlers, log.propagate = [times], False
    log.setLevel(logging.DEBUG)
    return times


def _compiled(model: nn.Module, form: str) -> Callable[..., Tensor]:
    if form == "eager":
        return model
    backend, _, kind = form.partition(":")
    options: dict[str, Any] | None = {"level_weights": kind} if kind else None
    return torch.compile(model, backend=backend, options=options, dynamic=False)  # type: ignore[return-value]


def _training(call: Callable[..., Tensor], model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], object]:
    def run() -> object:
        o = call(x)  # the first call makes the level weights
        return torch.autograd.grad(o, [x, *model.parameters()], y)

    return run


def _first(run: Callable[[], object]) -> dict[str, Any]:
    """Seconds and memory of the first call, which compiles."""
    before = resident()
    reset_peak()
    started = time.perf_counter()
    run()
    seconds = time.perf_counter() - started
    return {"compile_seconds": seconds, "compile_peak_mib": max(peak() - before, 0) / 2**20}


def _rewritten() -> dict[str, Any]:
    """The certificate.

    Raises:
        SystemExit: nothing was rewritten, so that the times are those of the code as it was.
    """
    from llcompile.backend import last_report

    report = last_report()
    if not report.converted:
        raise SystemExit("not rewritten: " + "; ".join(d.reason for d in report.declined))
    certificate = report.converted[0].certificate
    return {"proof_error": certificate.max_error, "proof_dtype": certificate.dtype, "draws": certificate.draws}


def _counted() -> dict[str, int]:
    from llcompile.backend import last_report

    report = last_report()
    return {name: len(getattr(report, name)) for name in ("converted", "declined", "untouched")}


def _model(job: dict[str, Any]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    config = job["config"]
    if config is not None:
        import transformers

        made = transformers.AutoConfig.for_model(job["model"], **config["kwargs"])
        made.use_cache = False
        model = getattr(transformers, config["class"]).from_config(made).eval()
        return model, torch.randint(made.get_text_config().vocab_size, (1, job["length"]))
    heads, dim = 2, 16
    kinds = {"token loop": TokenLoop(heads * dim, heads), "quadratic": Quadratic(heads * dim, heads, decay=True)}
    return kinds[job["model"]], torch.randn(1, job["length"], heads * dim)


def _limit_memory() -> None:
    """Lets an allocation that this machine has no memory for fail, rather than the machine."""
    path = Path("/proc/meminfo")
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        free = next(int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith("MemAvailable"))
        taken = int(FITS * free * 1024) + resident()
        resource.setrlimit(resource.RLIMIT_DATA, (taken, resource.getrlimit(resource.RLIMIT_DATA)[1]))


if __name__ == "__main__":
    main(sys.argv[1])
