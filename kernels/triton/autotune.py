"""Launch parameters by measurement: few candidates, timed once for each kind of launch, kept on disk.

Off unless `LLCOMPILE_AUTOTUNE=1`: a first call that tunes compiles each of its kernels several times over. Launches
of one kernel whose numbers of programs (chunks of all heads, for most) have as many bits are of one kind. What spills
is timed like the rest. The fastest is tested before its numbers are used, as the defaults are (`acceptance`); if it is
wrong, the next one is. What was chosen lies in a file of its own beside generated kernels, with what was measured:
under the names of the device and of Triton, and the hash of the kernels' source. A process reads each file once; from
then on a launch costs one look into a dict.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llcompile.errors import KernelCacheError, OptionError
from llcompile.kernels import cache
from llcompile.kernels.triton.description import Description
from llcompile.kernels.triton.launch import Kernel, Launch
from llcompile.kernels.triton.limits import interpreted
from llcompile.kernels.triton.meter import Meter, meter_of
from llcompile.kernels.triton.schedule import KERNELS
from llcompile.kernels.triton.source import generate
from llcompile.kernels.triton.tuning import Tuning, narrowest

VARIABLE = "LLCOMPILE_AUTOTUNE"
# Numbers of an fp32 tile that a thread may hold: half of the 255 registers that one can have.
_TILE_REGISTERS = 128
_WARP = 32
_log = logging.getLogger("llcompile.kernels")
# By kernel, bits of the number of programs, meter, and whether there was a test of what is picked.
_chosen: dict[tuple[Kernel, int, Meter, bool], Tuning] = {}
_instead: ContextVar[Callable[[Launch], None] | None] = ContextVar("instead", default=None)


# Launch parameters of all kernels while a test of them runs: the defaults but for those here; and the ones that ran.
Fixed = tuple[Mapping[Kernel, Tuning], set[Kernel]]
_fixed: ContextVar[Fixed | None] = ContextVar("llcompile_fixed", default=None)
# What tests launch parameters with the pass that is running; see `Judged`.
Judge = Callable[[Kernel, Tuning], str | None]
_judge: ContextVar[Judge | None] = ContextVar("llcompile_judge", default=None)


@contextlib.contextmanager
def fixed(launches: Mapping[Kernel, Tuning]) -> Iterator[set[Kernel]]:
    """Run launches inside with `launches`, or else the defaults, and tune none: a test is too small to tune for.

    Yields the kernels of `launches` that have run so far.
    """
    seen: set[Kernel] = set()
    token = _fixed.set((launches, seen))
    try:
        yield seen
    finally:
        _fixed.reset(token)


class Judged:
    """Let a judge say why launch parameters that are picked inside must not be used; None where they may be.

    Every call of an operator enters one, and a generator would take longer.
    """

    __slots__ = ("_before", "_by")

    def __init__(self, judge: Judge) -> None:
        self._by = judge

    def __enter__(self) -> None:
        self._before = _judge.set(self._by)

    def __exit__(self, *_: object) -> None:
        _judge.reset(self._before)


def run(launch: Launch) -> None:
    """Run `launch`: with what was measured to be best where tuning is on, else with the defaults."""
    run_all((launch,))


def run_all(launches: Iterable[Launch]) -> None:
    """Likewise, each as it comes. What there is to look up is looked up once: it takes as long as a short launch."""
    act = _instead.get() or _by_tuning(_fixed.get())
    for launch in launches:
        if launch.programs:
            act(launch)


def _by_tuning(given: Fixed | None) -> Callable[[Launch], None]:
    """What runs a launch with the launch parameters that hold now."""
    if given is not None:
        return partial(_with_fixed, *given)
    if (meter := current_meter()) is not None:
        return lambda launch: launch(best(launch, meter))
    return lambda launch: launch(launch.kernel.default)


def _with_fixed(launches: Mapping[Kernel, Tuning], seen: set[Kernel], launch: Launch) -> None:
    chosen = launches.get(launch.kernel)
    if chosen is not None:
        seen.add(launch.kernel)
    launch(chosen or launch.kernel.default)


@contextlib.contextmanager
def handed_to(act: Callable[[Launch], None]) -> Iterator[None]:
    """Hand launches to `act` instead of the device, for `cost`."""
    token = _instead.set(act)
    try:
        yield
    finally:
        _instead.reset(token)


def current_meter() -> Meter | None:
    """The meter of the current device where `LLCOMPILE_AUTOTUNE` is 1, else None; raises `OptionError`."""
    text = os.environ.get(VARIABLE) or "0"
    if text not in ("0", "1"):
        raise OptionError(f"{VARIABLE} is {text!r}; expected 1 (tune launches on this device) or 0 (the defaults)")
    return meter_of(torch.cuda.current_device()) if text == "1" and not interpreted() else None


def best(launch: Launch, meter: Meter) -> Tuning:
    """The launch parameters that `meter` found fastest for this kind of launch, now or in an earlier process.

    What `launch` changes in place is as before when this returns; what it only writes is not.
    """
    kind = (launch.kernel, launch.programs.bit_length(), meter, _judge.get() is not None)
    if kind in _chosen:
        return _chosen[kind]
    question = _question(launch, meter)
    found = _read(question)
    if found is None:
        if not meter.ready():
            return launch.kernel.default
        try:
            found = _measure(launch, meter, question)
        except torch.OutOfMemoryError:
            _log.warning("%s runs with its defaults: not enough memory to tune it", launch.kernel.name)
            found = launch.kernel.default
    _chosen[kind] = found
    return found


def candidates(kernel: Kernel) -> tuple[Tuning, ...]:
    """What is tried, the default first: other value tiles and numbers of warps, and other numbers of stages."""
    default, least = kernel.default, narrowest(kernel.name, kernel.d)
    widest = default.value_tile * 2 if kernel.d.rated else kernel.d.value_tile  # lanes of any number of heads
    others = (default.value_tile // 2, default.value_tile * 2) if kernel.tiled else ()
    tiles = (default.value_tile, *(t for t in others if least <= t <= widest))
    found = [default._replace(value_tile=t, warps=w) for t in tiles for w in (default.warps, 4, 8)]
    found += [default._replace(stages=s) for s in (1, 2, 3)]
    return tuple(dict.fromkeys(c for c in found if c == default or not _crowded(kernel.d, c)))


def _crowded(d: Description, chosen: Tuning) -> bool:
    """Whether one tile of a state or of a chunk's rows would take more than half of the registers."""
    return max(d.key_tile, d.chunk) * chosen.value_tile > _TILE_REGISTERS * _WARP * chosen.warps


# -- measuring ---------------------------------------------------------------------------------------------------------


def _measure(launch: Launch, meter: Meter, question: dict[str, Any]) -> Tuning:
    """Time every candidate that fits, write down what came out, and return the fastest that is right."""
    rows: dict[Tuning, dict[str, Any]] = {}
    times: dict[Tuning, float] = {}
    with unchanged(launch):
        for candidate in candidates(launch.kernel):
            reason = meter.refused(launch, candidate)
            if reason is None:
                times[candidate] = meter.milliseconds(partial(launch, candidate))
                spilled = meter.spilled(launch, candidate)
                rows[candidate] = {"milliseconds": round(times[candidate], 5), "spilled": spilled}
            else:
                rows[candidate] = {"left_out": reason}
    chosen = launch.kernel.default
    for candidate in sorted(times, key=times.__getitem__):
        if (wrong := _wrong(launch.kernel, candidate)) is None:
            chosen = candidate
            break
        rows[candidate]["wrong"] = wrong
        _log.warning("%s would be fastest with %s, which is not used: %s", launch.kernel.name, candidate, wrong)
    _log.info("%s runs with %s: fastest of %d for %s", launch.kernel.name, chosen, len(times), question["programs"])
    measured = [{**candidate._asdict(), **row} for candidate, row in rows.items()]
    _write(question, {"question": question, "chosen": chosen._asdict(), "measured": measured})
    return chosen


def _wrong(kernel: Kernel, chosen: Tuning) -> str | None:
    """Why `kernel` must not run with these parameters; the defaults have been tested before this call."""
    judge = _judge.get()
    return None if judge is None or chosen == kernel.default else judge(kernel, chosen)


@contextlib.contextmanager
def unchanged(launch: Launch) -> Iterator[None]:
    """Put back what the kernel changes in place, as it would otherwise change it once more with every run inside."""
    changed = [
        x
        for name, x in zip(launch.kernel.parameters, launch.arguments, strict=True)
        if name in KERNELS[launch.kernel.name].changes and isinstance(x, Tensor)
    ]
    saved = [x.clone() for x in changed]
    try:
        yield
    finally:
        for x, copy in zip(changed, saved, strict=True):
            x.copy_(copy)


# -- on disk -----------------------------------------------------------------------------------------------------------


def _question(launch: Launch, meter: Meter) -> dict[str, Any]:
    """Everything that an answer depends on."""
    bits = launch.programs.bit_length()
    return {
        "kernel": launch.kernel.name,
        "description": repr(launch.kernel.d),
        "source": hashlib.sha256(generate(launch.kernel.d).encode()).hexdigest(),
        "programs": f"{1 << (bits - 1)} to {(1 << bits) - 1}",
        "device": meter.name,
        "candidates": [list(c) for c in candidates(launch.kernel)],
        "tested": _judge.get() is not None,  # what was picked without a test serves no call that has one
    }


def file_of(question: dict[str, Any]) -> Path:
    """Where the answer to `question` lies."""
    name = hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()[:16]
    return cache.folder() / "tuned" / f"{question['kernel']}_{name}.json"


def _read(question: dict[str, Any]) -> Tuning | None:
    """The answer on disk; None where there is none, or none that can be used, which is said."""
    path = file_of(question)
    try:
        found = json.loads(path.read_text())
        chosen = Tuning(**found["chosen"])
        if found["question"] != question or list(chosen) not in question["candidates"]:
            raise ValueError("it is for another launch")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        _log.warning("%s cannot be used (%s: %s); %s is tuned again", path, type(error).__name__, error, path.stem)
        return None
    return chosen


def _write(question: dict[str, Any], answer: dict[str, Any]) -> None:
    try:
        cache.write(file_of(question), (json.dumps(answer, indent=1) + "\n").encode())
    except KernelCacheError as error:
        _log.warning("tuning results are kept for this process only: %s", error)
