"""Every kernel of a representative set of descriptions, compiled for every chip: what it takes, and whether it fits.

`llcompile kernels matrix` is the command. What it found is kept in a file, and compiled no second time.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import platform
from collections import defaultdict
from collections.abc import Iterable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch

from llcompile.kernels.triton.check import Report, compile_kernel, key_of
from llcompile.kernels.triton.chips import CHIPS
from llcompile.kernels.triton.description import Description
from llcompile.kernels.triton.limits import max_key_dim
from llcompile.kernels.triton.schedule import kernel_names
from llcompile.kernels.triton.tuning import Tuning

FAMILIES = tuple(itertools.product(("none", "scalar", "channel"), ("none", "delta")))
# Each group of descriptions by name, with what it adds to the families: sizes (K, V), levels, and the rest.
LOG_LINEAR, LINEAR = {"levels": 17}, {"levels": None}
STATES = {"initial_state": "level", "final_state": True, "padded": True, "repeat": 2}
GROUPS: dict[str, tuple[tuple[tuple[int, int], ...], tuple[dict[str, Any], ...]]] = {
    "large": (((128, 128),), (LOG_LINEAR, LINEAR)),
    "small": (((64, 64),), (LOG_LINEAR, LINEAR)),
    "states": (((128, 128),), (LOG_LINEAR | STATES, LINEAR | {"initial_state": "linear", "final_state": True})),
    "mixed": (((64, 128), (128, 64)), (LOG_LINEAR,)),
    "float32": (((128, 128), (64, 64)), (LOG_LINEAR | {"dtype": torch.float32},)),
    "float16": (((128, 128),), (LOG_LINEAR | {"dtype": torch.float16},)),
    "odd": (((96, 192), (16, 1)), (LOG_LINEAR,)),
    "wide": (((256, 256),), (LOG_LINEAR, LOG_LINEAR | {"dtype": torch.float32})),
    "blocks": (((128, 128), (128, 64), (64, 64)), (LOG_LINEAR | {"walk": 16},)),
    "rates": (((16, 1),), (LOG_LINEAR | STATES, {"levels": 16}, LINEAR)),
    "erase": (((64, 64), (128, 128)), (LOG_LINEAR | STATES, LINEAR)),
}
# Groups with families of their own.
OTHER_FAMILIES = {
    "blocks": tuple(itertools.product(("scalar", "none"), ("none", "delta"))),
    "rates": (("rate", "none"),),
    "erase": (("channel", "erase"),),
}
DEFAULT_CHIPS = ("sm_90", "gfx942", "sm_80", "sm_100")


def representative(group: str, chip: str) -> Iterator[Description]:
    """The descriptions of one group that `limits` lets run on `chip`."""
    sizes, others = GROUPS[group]
    families = OTHER_FAMILIES.get(group, FAMILIES)
    for (key_dim, value_dim), other, (decay, correction) in itertools.product(sizes, others, families):
        d = Description(decay, correction, key_dim, value_dim, backend="cuda", **other)  # type: ignore[arg-type]
        if key_dim <= max_key_dim(d, CHIPS[chip]):
            yield d


class Results:
    """Reports by what was compiled, in a JSON file that is written anew with each of them; in memory without a file."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.found: dict[str, Report] = {}
        self.versions = {"triton": _triton_version(), "torch": torch.__version__}
        if path is not None and path.exists():
            versions, found = read(path)
            self.found = found if versions == self.versions else {}

    def report(self, d: Description, kernel: str, chip: str) -> Report:
        """What a kernel takes: looked up, or compiled and kept; raises what Triton raises if it cannot be compiled."""
        key = key_of(d, kernel, CHIPS[chip])
        if key not in self.found:
            self.found[key] = compile_kernel(d, kernel, CHIPS[chip])
            self._write()
        return dataclasses.replace(self.found[key], description=d.on(CHIPS[chip]))

    def _write(self) -> None:
        if self.path is None:
            return
        record = {
            "date": date.today().isoformat(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU needed",
            "versions": self.versions,
            "kernels": [_row(key, report) for key, report in self.found.items()],
        }
        lines = json.dumps(record, indent=None, separators=(",", ":")).replace('{"key"', '\n{"key"')
        beside = self.path.with_suffix(".tmp")
        beside.write_text(lines + "\n")
        beside.replace(self.path)


def read(path: Path) -> tuple[dict[str, str], dict[str, Report]]:
    """The versions that a file was made with, and its reports by key."""
    record = json.loads(path.read_text())
    return record["versions"], {row["key"]: _report(row) for row in record["kernels"]}


def _row(key: str, report: Report) -> dict[str, Any]:
    fields = {f.name: getattr(report.description, f.name) for f in dataclasses.fields(Description)}
    fields["dtype"] = report.description.dtype_name
    changed = {f.name: fields[f.name] for f in dataclasses.fields(Description) if fields[f.name] != f.default}
    rest = {f.name: getattr(report, f.name) for f in dataclasses.fields(Report) if f.name != "description"}
    return {"key": key, **rest, "description": changed}


def _report(row: dict[str, Any]) -> Report:
    fields = dict(row["description"])
    fields["dtype"] = getattr(torch, fields["dtype"])
    kept = (f.name for f in dataclasses.fields(Report) if f.name not in ("description", "launch"))
    rest = {name: row[name] for name in kept if name in row}  # some were not counted in earlier files
    return Report(description=Description(**fields), launch=Tuning(*row["launch"]), **rest)


def _triton_version() -> str:
    import triton

    version: str = triton.__version__
    return version


def summary(reports: Iterable[Report]) -> Iterator[str]:
    """A Markdown table: the worst over all kernels, by chip and size."""
    columns = ["chip", "K", "V", "dtype", "kernels", "registers", "shared KB", "limit KB", "that spill", "worst, bytes"]
    columns += ["with one program at a time", "with asynchronous copies"]
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    groups: dict[tuple[Any, ...], list[Report]] = defaultdict(list)
    for report in reports:
        d = report.description
        groups[report.chip, d.key_dim, d.value_dim, d.dtype_name].append(report)
    for (chip, *size), found in groups.items():
        shared = max(r.shared for r in found)
        spilling = [r for r in found if r.spilled]
        cells = (chip, *size, len(found), max(r.registers for r in found), f"{shared / 1024:.0f}")
        cells += (CHIPS[chip].shared // 1024, len(spilling), max((r.spilled for r in spilling), default=0))
        uncounted = any(r.copies is None for r in found)
        cells += (sum(r.programs == 1 for r in found), "-" if uncounted else sum(bool(r.copies) for r in found))
        yield f"| {' | '.join(map(str, cells))} |"


def compile_all(d: Description, chip: str, results: Results) -> int:
    """Print a line a kernel; how many do not compile or do not fit."""
    wrong = 0
    for kernel in kernel_names(d):
        try:
            report = results.report(d, kernel, chip)
        except Exception as error:  # whatever the compiler raises, the others are still to be seen
            print(f"{chip:7} {d} {kernel} does not compile: {type(error).__name__}: {error}", flush=True)
            wrong += 1
            continue
        print(report.row() + ("" if report.fits() else "  DOES NOT FIT"), flush=True)
        wrong += not report.fits()
    return wrong
