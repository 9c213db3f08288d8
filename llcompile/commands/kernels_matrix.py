"""`llcompile kernels matrix`: every kernel of a representative set, compiled for chips that need not be there."""

from __future__ import annotations

import argparse
import itertools
import os
from pathlib import Path
from typing import Any

from llcompile.errors import KernelError, SpecError


def add_parser(kinds: Any) -> None:
    """Add this command to those of `llcompile kernels`."""
    parser = kinds.add_parser(
        "matrix",
        help="compile a representative set of kernels for several chips",
        description="Compile a representative set of kernels and print their registers, shared memory and spills. With "
        "--json FILE results are kept, and a second run compiles only what is missing. 'programs' is how many a "
        "multiprocessor has room for at a time; 'products' and 'copies' are the matrix instructions and asynchronous "
        "copies in a kernel's code. The exit code is 1 if a kernel does not compile or does not fit.",
    )
    parser.add_argument("chips", nargs="*", metavar="CHIP", help="sm_90, gfx942, … (default: four of them)")
    parser.add_argument(
        "--group", action="append", metavar="NAME", help="compile only this part of the set (default: all)"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="keep results in a file and do not compile anything twice"
    )
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--summary", action="store_true", help="compile nothing; print a table of the results in FILE")
    shown.add_argument("--rows", action="store_true", help="compile nothing; print each result in FILE")
    parser.set_defaults(act=_matrix)


def _matrix(args: argparse.Namespace) -> int:
    try:
        from llcompile.kernels.triton import matrix
        from llcompile.kernels.triton.check import HEADING
        from llcompile.kernels.triton.chips import CHIPS
    except ImportError as error:
        raise KernelError(f"compiling the kernels needs Triton ({error}): pip install triton") from error
    _check(args, CHIPS, matrix.GROUPS)
    if args.summary:
        print("\n".join(matrix.summary(matrix.read(args.json)[1].values())))
        return 0
    if args.rows:
        print("\n".join((HEADING, *(report.row() for report in matrix.read(args.json)[1].values()))))
        return 0
    results, wrong = matrix.Results(args.json), 0
    print(HEADING)
    for chip, group in itertools.product(args.chips or matrix.DEFAULT_CHIPS, args.group or matrix.GROUPS):
        for d in matrix.representative(group, chip):
            wrong += matrix.compile_all(d, chip, results)
    return int(wrong > 0)


def _check(args: argparse.Namespace, chips: Any, groups: Any) -> None:
    for what, given, known in (("chip", args.chips, chips), ("group", args.group or (), groups)):
        unknown = [name for name in given if name not in known]
        if unknown:
            raise SpecError(f"unknown {what} {unknown[0]!r}; known: {', '.join(known)}")
    shown = "--summary" if args.summary else "--rows" if args.rows else None
    if shown and (args.json is None or not args.json.is_file()):
        raise SpecError(f"{shown} needs --json with an existing file, got {args.json}")
    if os.environ.get("TRITON_INTERPRET") and not shown:
        raise KernelError("kernels cannot be compiled while TRITON_INTERPRET is set")
