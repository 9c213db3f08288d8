"""`llcompile doctor`: check the environment and explain what is missing."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from llcompile import __version__
from llcompile.arguments import check_device


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what was found, whether all is well, and what to do if not.

    `ok` is None where a thing is merely absent and optional.
    """

    topic: str
    found: str
    ok: bool | None = True
    advice: str = ""


_INNER = ("inductor", "aot_eager", "eager")  # of llcompile.options, which imports torch


def add_parser(subparsers: Any) -> None:
    """Add this command to the command line."""
    parser = subparsers.add_parser(
        "doctor",
        help="check the environment and explain what is missing",
        description="Check the environment and explain what is missing. Convert, compile and train a tiny model of "
        "each family and library, unless --no-self-test is given. The exit code is 1 if the backend cannot run or "
        "something converted does not act.",
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument("--no-self-test", action="store_true", help="compile nothing; only check what is installed")
    parser.add_argument(
        "--inner",
        choices=_INNER,
        default="eager",
        help="inner compiler of the self-test (default: eager)",
    )
    parser.add_argument("--device", help="device of the self-test (default: a GPU if there is one)")


def run(args: argparse.Namespace) -> int:
    """Print all findings; 1 if one of them keeps the backend from running or does not act."""
    if args.device is not None:
        check_device(args.device)
    findings = environment()
    if not args.no_self_test:
        findings += self_test(args.inner, args.device)
    findings += kernel_tests()
    if args.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        _show(findings)
    return int(any(finding.ok is False for finding in findings))


def environment() -> list[Finding]:
    """All findings, in the order in which they build upon each other."""
    return [finding for check in CHECKS for finding in check()]


def self_test(inner: str = "eager", device: str | None = None) -> list[Finding]:
    """What acts here: a tiny model for each family and each importable library, through the real backend.

    It runs on `device`, or else on a GPU if there is one.
    """
    import torch

    from llcompile.commands import self_test

    place = self_test.Place(device or ("cuda" if torch.cuda.is_available() else "cpu"), inner)
    topic = "self-test" if place.device == "cpu" else f"self-test on {place.device}"
    advice = "please report it with the output of `llcompile doctor --json`"
    return [
        Finding(f"{topic}: {entry.name}", entry.detail, entry.acts, advice if entry.acts is False else "")
        for entry in self_test.every(place)
    ]


def kernel_tests() -> list[Finding]:
    """What is known of the Triton kernels on each GPU: faults of its Triton, and what tests of kernels found so far."""
    import torch

    if importlib.util.find_spec("triton") is None:
        return []
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [finding for device in devices for finding in tests_of(device)]


def tests_of(device: Any) -> Iterator[Finding]:
    """The findings for one device."""
    from llcompile.kernels.triton import faults, records
    from llcompile.kernels.triton.toolchain import toolchain_of

    found, topic = toolchain_of(device), f"kernels on {device}"
    refused = faults.refusal(found)
    if refused is not None:
        yield Finding(topic, f"not used: {refused}", None, "until then the operator runs on ATen there")
    else:
        known = [str(fault) for fault in faults.known(found)]
        suspects = f"; known faults, looked for in each test: {'; '.join(known)}" if known else ""
        yield Finding(topic, f"{found}{suspects}")
    done, failed = list(records.every(device)), 0
    for record in done:
        asked, wrong = record["question"], records.outcome(record)[1]
        if wrong is None:
            continue
        failed += 1
        launch = f", {asked['kernel']} launched as {asked.get('launch')}," if "kernel" in asked else ""
        instead = "other launch parameters are used" if launch else "ATen runs"
        advice = f"{instead} instead; please report it. To test again, remove {record['path']}"
        said = f"{asked['pass']} of {asked['description']}{launch} failed its test: {wrong}"
        yield Finding(topic, said, None, advice)
    passed = sum(record.get("result") == "passed" for record in done)
    yield Finding(f"{topic}: tests", f"{passed} passed, {failed} failed; kernels are tested before their first use")


def _python() -> Iterator[Finding]:

    yield Finding("llcompile", __version__)
    yield Finding("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _torch() -> Iterator[Finding]:
    import torch

    from llcompile.torch_internals.logs import KERNEL_LOG_NAME, LOG_NAME

    yield _against_tested("torch", "torch")
    named = LOG_NAME in torch._dynamo.list_backends(exclude_tags=())
    yield Finding(
        "backend name",
        "torch.compile finds 'loglinear'" if named else "torch.compile does not find 'loglinear'",
        named,
        "" if named else "install llcompile with pip, so that its entry points are registered",
    )
    from torch._logging._internal import log_registry

    logs = log_registry.is_log(LOG_NAME) and log_registry.is_artifact(KERNEL_LOG_NAME)
    yield Finding(
        "log names",
        "TORCH_LOGS=loglinear and loglinear_kernels work" if logs else "TORCH_LOGS does not accept loglinear",
        True if logs else None,
        "" if logs else "unset TORCH_DEVICE_BACKEND_AUTOLOAD, or use TORCH_LOGS=llcompile",
    )


def _compiler() -> Iterator[Finding]:
    logging.disable(logging.ERROR)  # Inductor logs what it tries
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        yield Finding("C++ compiler", get_cpp_compiler())
    except Exception as error:
        yield Finding(
            "C++ compiler",
            f"none ({type(error).__name__})",
            None,
            "install g++ or clang++, or use options={'inner': 'aot_eager'}: the rewritten graph then runs uncompiled",
        )
    finally:
        logging.disable(logging.NOTSET)


def _devices() -> Iterator[Finding]:
    import torch

    yield Finding("cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} torch threads, {_isa(torch)}")
    for index in range(torch.cuda.device_count()):
        kind = "rocm" if torch.version.hip else "cuda"
        yield Finding(f"{kind}:{index}", torch.cuda.get_device_name(index))
    if not torch.cuda.device_count():
        yield Finding("gpu", "none; everything runs on the CPU", None)
    triton = importlib.util.find_spec("triton") is not None
    yield Finding("triton", _version("triton") if triton else "not installed", True if triton else None)


def _against_tested(topic: str, distribution: str, more: str = "") -> Finding:
    """A library's version, and whether it lies within those that were tested."""
    from llcompile.integrations import versions
    from llcompile.integrations.versions import TESTED

    version = versions.installed(distribution) or "of unknown version"
    found = f"{version}, {more}" if more else version
    if distribution not in TESTED:
        return Finding(topic, found)
    oldest, newest = TESTED[distribution]
    if versions.older(distribution):
        advice = f"llcompile is tested with {topic} {oldest} to {newest}: pip install -U {topic}"
        return Finding(topic, found, False, advice)
    if versions.newer(distribution):
        return Finding(topic, found, True, f"newer than {newest}, the newest tested: see the self-test below")
    return Finding(topic, found)


# The distribution whose version counts, where its name is not the module's.
_DISTRIBUTIONS = {"fla": "fla-core", "mamba_ssm": "mamba-ssm"}


def _isa(torch: Any) -> str:
    return str(torch.backends.cpu.get_cpu_capability())


def _libraries() -> Iterator[Finding]:
    """For each library of known functions, how many rows of the table the installed version fits."""
    from llcompile.patterns.known import ENTRIES

    for library in dict.fromkeys(entry.library for entry in ENTRIES):
        entries = [entry for entry in ENTRIES if entry.library == library]
        if importlib.util.find_spec(library) is None:
            yield Finding(library, f"not installed; its {len(entries)} known functions are not used", None)
        else:
            names = sorted({entry.function for entry in entries})
            yield _against_tested(library, _DISTRIBUTIONS.get(library, library), f"entries for {', '.join(names)}")


def _kernels() -> Iterator[Finding]:
    """What the operator would run by, and whether generated kernels have a place."""
    import torch

    from llcompile.kernels import cache
    from llcompile.kernels.choice import VARIABLE

    chosen = os.environ.get(VARIABLE) or "auto"
    there = importlib.util.find_spec("triton") is not None
    runs = there and torch.cuda.is_available()
    by = {"auto": f"{'Triton kernels on a GPU, ' if runs else ''}C++ kernels on a CPU"}
    by |= {"cpp": "C++ kernels", "triton": "Triton kernels", "aten": "ATen"}
    found = Finding("operator", f"{by.get(chosen, 'unknown')} ({VARIABLE}={chosen})")
    if chosen not in by:
        found = replace(found, ok=False, advice=f"set {VARIABLE} to one of {', '.join(by)}")
    elif not there:
        found = replace(found, advice="pip install triton")
    elif not runs:
        advice = "no GPU; kernels can be generated and compiled for one (llcompile inspect --kernels)"
        found = replace(found, advice=advice)
    yield found
    yield _cpp_kernels()
    folder = cache.folder()
    held = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    writable = held.is_dir() and os.access(held, os.W_OK)
    advice = "" if writable else f"set {cache.FOLDER_VARIABLE} to a writable folder"
    yield Finding("kernel folder", f"{folder}{'' if writable else ' is not writable'}", writable or None, advice)


def _cpp_kernels() -> Finding:
    """Whether a file that includes what generated C++ includes can be compiled and loaded."""
    from llcompile.errors import KernelError
    from llcompile.kernels.cpp import build, compiler

    topic, advice = "C++ kernels", "until then the operator runs on ATen on a CPU, which is slower"
    try:
        build.check()
        found = compiler.find()
    except KernelError as error:
        return Finding(topic, str(error), None, advice)
    return Finding(topic, f"{' '.join(found.command)} works: {found.version.splitlines()[0]}")


# What it is for, the modules that it takes, and the extra that installs them.
_EXTRAS = (
    ("MLIR (to_mlir, --mlir)", ("torch_mlir",), "mlir"),
    ("page (to_html, --html)", ("jinja2", "pygments", "grandalf"), "html"),
    ("plots", ("matplotlib",), "plot"),
)


def _extras() -> Iterator[Finding]:
    for what, modules, extra in _EXTRAS:
        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        if missing:
            found, advice = f"{', '.join(missing)} not installed", f"pip install 'llcompile[{extra}]'"
        else:
            found, advice = ", ".join(f"{name} {_version(name)}" for name in modules), ""
        yield Finding(what, found, None if missing else True, advice)


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    _python,
    _torch,
    _compiler,
    _devices,
    _kernels,
    _libraries,
    _extras,
)


def _version(module: str) -> str:
    names = importlib.metadata.packages_distributions().get(module, [module])
    try:
        return importlib.metadata.version(names[0])
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def _show(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    marks = {True: "[green]ok[/]", False: "[red]no[/]", None: "[dim]--[/]"}
    for finding in findings:
        advice = f"\n[dim]{escape(finding.advice)}[/]" if finding.advice else ""
        table.add_row(marks[finding.ok], finding.topic, escape(finding.found) + advice)
    Console().print(table)
