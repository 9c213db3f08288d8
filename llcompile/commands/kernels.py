"""`llcompile kernels show|list|matrix|cost`: the generated kernels as text, the files on disk, what they take."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

from llcompile.arguments import at_least
from llcompile.commands import kernels_cost, kernels_matrix
from llcompile.errors import KernelError, SpecError
from llcompile.kernels.description import Correction, Decay
from llcompile.kernels.levels import MOST_LEVELS

DTYPES = ("bfloat16", "float16", "float32", "float64")
TARGETS = ("cpu", "cuda", "hip")


def add_parser(subparsers: Any) -> None:
    """Add this command to the command line."""
    parser = subparsers.add_parser(
        "kernels",
        help="show the generated kernels and compile them for a chip",
        description="Show the kernels that are generated for an operator: Triton for a GPU, C++ for a CPU. Compile "
        "those of a GPU for a chip to see their registers and shared memory. Neither a GPU nor a model is needed.",
    )
    kinds = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    listing = kinds.add_parser("list", help="list the generated files on disk with their descriptions")
    listing.set_defaults(act=_list)
    kernels_matrix.add_parser(kinds)
    kernels_cost.add_parser(kinds)
    show = kinds.add_parser("show", help="print the source of the kernels for one operator")
    show.set_defaults(act=_show)
    _add_description(show)
    show.add_argument(
        "--target", choices=TARGETS, help="what the kernels are for (default: the kind of GPU that torch was built for)"
    )
    show.add_argument("--kernel", metavar="NAME", help="print one kernel only")
    show.add_argument("--keep", metavar="DIR", type=Path, help="also write the file to a folder, and print its name")
    show.add_argument(
        "--chip", metavar="CHIP", help="compile for a chip (such as sm_90) and add registers, shared memory and spills"
    )


def _add_description(parser: argparse.ArgumentParser) -> None:
    decays, corrections = get_args(Decay), get_args(Correction)
    parser.add_argument("--decay", choices=decays, default="scalar", help="default: scalar; rate: Mamba-1's scan")
    parser.add_argument("--correction", choices=corrections, default="none", help="default: none")
    parser.add_argument("--key-dim", metavar="K", type=at_least(1), default=64, help="default: 64")
    parser.add_argument("--value-dim", metavar="V", type=at_least(1), default=64, help="default: 64")
    parser.add_argument(
        "--repeat", metavar="N", type=at_least(1), default=1, help="heads per group, H / G (default: 1)"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default=DTYPES[0], help=f"dtype of the operands (default: {DTYPES[0]})"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--levels",
        metavar="L",
        type=at_least(1, MOST_LEVELS),
        default=17,
        help=f"level weights per token, at most {MOST_LEVELS} (default: 17)",
    )
    form.add_argument("--linear", action="store_true", help="use the linear operator, without level weights")
    parser.add_argument("--initial-state", choices=("linear", "level"), help="start from a state of this kind")
    parser.add_argument("--final-state", action="store_true", help="return the state after the last token")
    rows = parser.add_mutually_exclusive_group()
    rows.add_argument("--padded", action="store_true", help="rows of different lengths")
    rows.add_argument("--packed", action="store_true", help="sequences one after another in one row")


def run(args: argparse.Namespace) -> int:
    """Print what was asked for.

    Raises:
        SpecError: a kernel or chip that there is not.
        KernelError: Triton is needed and not there, or is set to interpret.
        KernelCacheError: the folder of `--keep` cannot be written.
    """
    return int(args.act(args))


def _list(args: argparse.Namespace) -> int:
    from llcompile.kernels import cache
    from llcompile.kernels.cpp import show as cpp
    from llcompile.kernels.triton import show as triton

    found = [*triton.files(), *cpp.files()]
    if not found:
        print(f"no generated kernels in {cache.folder()}; they are written when the operator first runs")
    for path, text in found:
        print(f"{path}\n    {text}")
    return 0


def _show(args: argparse.Namespace) -> int:
    return _show_cpp(args) if args.target == "cpu" else _show_triton(args)


def _show_cpp(args: argparse.Namespace) -> int:
    from llcompile.kernels.cpp import show

    for flag in ("chip", "kernel"):
        if getattr(args, flag) is not None:
            raise SpecError(f"--{flag} {getattr(args, flag)}: of Triton kernels only; C++ is one file for any CPU")
    d = _described(args)
    _print(show.source_of(d), "cpp")
    if args.keep is not None:
        print(f"written to {show.keep(d, args.keep)}", file=sys.stderr)
    return 0


def _show_triton(args: argparse.Namespace) -> int:
    from llcompile.kernels.triton import chips, limits, show
    from llcompile.kernels.triton.description import BACKEND

    if args.dtype == "float64":
        raise SpecError("--dtype float64: Triton kernels take bfloat16, float16 and float32; see --target cpu")
    d = _described(args)
    chip = chips.CHIPS[_known("chip", args.chip, chips.CHIPS)] if args.chip else None
    if chip is not None and args.target not in (None, chip.backend):
        raise SpecError(f"--chip {args.chip}: a chip of target {chip.backend}, not of --target {args.target}")
    chip = chip or chips.assumed(args.target or BACKEND)
    if reason := limits.beyond(d, chip):
        raise SpecError(f"--key-dim {d.key_dim}: there are no Triton kernels for it: {reason}; ATen runs such calls")
    source = show.source_of(d, chip)
    parts = show.kernels_in(source)
    if args.kernel is not None:
        source = parts[_known("kernel", args.kernel, parts)]
    reports = _reports(d, args.chip, args.kernel) if args.chip else []
    _print(source, "python")
    for line in reports:
        print(line)
    if args.keep is not None:
        print(f"written to {show.keep(d, args.keep, chip)}", file=sys.stderr)
    return 0


def _described(args: argparse.Namespace) -> Any:
    import torch

    from llcompile.kernels.description import Description

    d = Description(
        decay=args.decay,
        correction=args.correction,
        key_dim=args.key_dim,
        value_dim=args.value_dim,
        repeat=args.repeat,
        dtype=getattr(torch, args.dtype),
        levels=None if args.linear else args.levels,
        initial_state=args.initial_state or "none",
        final_state=args.final_state,
        padded=args.padded,
        packed=args.packed,
    )
    if d.without_kernels:
        raise SpecError(f"--decay {d.decay} --correction {d.correction}: {d.without_kernels}; ATen runs such calls")
    return d


def _reports(d: Any, chip: str, kernel: str | None) -> list[str]:
    """A table of what the kernels take on `chip`, as comments."""
    try:
        from llcompile.kernels.triton import check, show
    except ImportError as error:
        raise KernelError(f"--chip compiles the kernels, which needs Triton ({error}): pip install triton") from error
    if os.environ.get("TRITON_INTERPRET"):
        raise KernelError("--chip compiles the kernels, which Triton does not do while TRITON_INTERPRET is set")
    rows = show.resources(d, chip, None if kernel is None else (kernel,))
    return [f"# {line}".rstrip() for line in (check.HEADING, *(row.row() for row in rows))]


def _known(what: str, name: str, names: Iterable[str]) -> str:
    """`name`, if it is one of `names`; else a SpecError that tells them."""
    names = list(names)
    if name in names:
        return name
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise SpecError(f"--{what} {name}: unknown {what}; {hint}Known: {', '.join(names)}")


def _print(source: str, language: str) -> None:
    """With colours on a terminal, as it is elsewhere."""
    if not sys.stdout.isatty():
        print(source.rstrip())
        return
    from rich.console import Console
    from rich.syntax import Syntax

    Console().print(Syntax(source.rstrip(), language, background_color="default"))
