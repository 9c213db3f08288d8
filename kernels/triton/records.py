"""What tests of kernels found, on disk: a JSON file each, safe while other processes test the same kernels."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from llcompile import errors
from llcompile.kernels import cache
from llcompile.kernels.description import Description, ReadoutDescription
from llcompile.kernels.triton import blocks, description, readout_source, source
from llcompile.kernels.triton.chips import chip_of
from llcompile.kernels.triton.schedule import kernel_names
from llcompile.kernels.triton.toolchain import text, toolchain_of
from llcompile.kernels.triton.tuning import tuning

# A test that ended with its process, and left no result, is tried again this many times in all.
ATTEMPTS = 2
_log = logging.getLogger("llcompile.kernels")


def question(d: Description | ReadoutDescription, device: torch.device, sweep: str) -> dict[str, Any]:
    """All that a result depends on."""
    return {**machine(device), "description": repr(d), "pass": sweep, "kernels": _revision(d, device)}


def machine(device: torch.device) -> dict[str, Any]:
    """The device by name, and what makes kernels for it."""
    found = toolchain_of(device)
    here = device.type == "cuda" and torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name(device) if here else device.type,
        "chip": found.chip.name,
        "triton": text(found.triton),
        "ptxas": None if found.ptxas is None else text(found.ptxas),
        "torch": torch.__version__,
    }


def _revision(d: Description | ReadoutDescription, device: torch.device) -> str:
    """A hash of the kernels' text and of how they are launched."""
    if isinstance(d, ReadoutDescription):
        found: list[Any] = [readout_source.generate(d)]
    else:
        chip = chip_of(device)
        here = description.Description.of(d).on(chip)
        every = [here, blocks.in_blocks(here)] if blocks.may(here) else [here]
        found = [part for d in every for part in (source.generate(d), [tuning(n, d, chip) for n in kernel_names(d)])]
    return hashlib.sha256(repr(found).encode()).hexdigest()[:16]


class Record:
    """The result of one test: settled or not, and why the kernels must not be used."""

    def __init__(self, asked: dict[str, Any]) -> None:
        self.question = asked
        name = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]
        self.path = folder() / f"{asked['pass']}_{name}.json"
        self.settled, self.attempts = False, 0
        self.failure: str | None = None
        found = read(self.path)
        if found is not None and found.get("question") == asked:
            self._take(found)

    def _take(self, found: dict[str, Any]) -> None:
        self.attempts = _attempts(found)
        self.settled, failure = outcome(found)
        self.failure = None if failure is None else self._words(failure)

    def _words(self, found: str) -> str:
        return f"their test on this device failed: {found} (kept in {self.path}; remove it to test them again)"

    def begin(self) -> None:
        """Leave a mark: a kernel may take its whole process down."""
        self.attempts += 1
        self._write({"result": "begun"})

    def settle(self, failure: str | None) -> None:
        """Keep a result."""
        self.settled, self.failure = True, None if failure is None else self._words(failure)
        self._write({"result": "passed" if failure is None else "failed", "found": failure})

    def withdraw(self) -> None:
        """Forget an attempt that was ended from outside, by an interrupt or for lack of memory."""
        self.attempts -= 1
        with contextlib.suppress(OSError):
            self.path.unlink()

    def _write(self, found: dict[str, Any]) -> None:
        content = {"question": self.question, "attempts": self.attempts, **found}
        try:
            cache.write(self.path, (json.dumps(content, indent=1) + "\n").encode())
        except errors.KernelCacheError as error:
            _log.warning("what a test of kernels found is kept for this process only: %s", error)


@contextlib.contextmanager
def kept(asked: dict[str, Any]) -> Iterator[Record]:
    """The record of a test, which this process alone may now run: others wait, and find what came out."""
    record = Record(asked)
    if record.settled:
        yield record
        return
    with cache.turn(folder() / f".{record.path.stem}.lock"):
        record = Record(asked)  # another process may have been faster
        if record.settled:
            yield record
            return
        record.begin()
        try:
            yield record
        finally:
            if not record.settled:
                record.withdraw()


def folder() -> Path:
    """Where records are."""
    return cache.folder() / "tested"


def read(path: Path) -> dict[str, Any] | None:
    """A record as it is on disk; None where there is none, or none that can be read."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def outcome(found: dict[str, Any]) -> tuple[bool, str | None]:
    """Whether the test of a record is settled, and what is wrong, if anything."""
    if found.get("result") in ("passed", "failed"):
        return True, str(found.get("found")) if found["result"] == "failed" else None
    attempts = _attempts(found)
    return (True, f"{attempts} processes ended while they ran it") if attempts >= ATTEMPTS else (False, None)


def _attempts(found: dict[str, Any]) -> int:
    attempts = found.get("attempts")
    return attempts if isinstance(attempts, int) else 0


def every(device: torch.device) -> Iterator[dict[str, Any]]:
    """The records of this device, and of what makes kernels for it now."""
    here = machine(device)
    for path in sorted(folder().glob("*.json")):
        found = read(path)
        asked = None if found is None else found.get("question")
        if found is None or not isinstance(asked, dict) or not {"pass", "description"} <= asked.keys():
            continue
        if here.items() <= asked.items():
            yield {**found, "path": str(path)}
