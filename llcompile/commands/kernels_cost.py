"""`llcompile kernels cost`: what the Triton kernels move, compute and allocate, counted without a GPU."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
from pathlib import Path
from typing import Any

from llcompile.arguments import at_least
from llcompile.errors import KernelError, SpecError
from llcompile.kernels.levels import MOST_LEVELS
from llcompile.kernels.triton.cost.families import FAMILIES, PASSES, STEPS

DTYPES = ("bfloat16", "float16", "float32")
_RATES = {"key_dim": 16, "value_dim": 1, "heads": 1536, "groups": 1}
_OTHERS = {"key_dim": 128, "value_dim": 128, "heads": 32, "groups": None}


def add_parser(kinds: Any) -> None:
    """Add this command to those of `llcompile kernels`."""
    parser = kinds.add_parser(
        "cost",
        help="count bytes, FLOPs, launches and memory of the kernels, without a GPU",
        description="Count what the Triton kernels move, compute and allocate. Small lengths run in Triton's "
        "interpreter; counts at the length that is asked for follow from them exactly, or there is an error. "
        "'loaded' and 'stored' are what instructions ask for, 'moved' is distinct bytes for each head and value tile.",
    )
    add = parser.add_argument
    add("--family", action="append", choices=tuple(FAMILIES), help="decay/correction; may be repeated (default: all)")
    add("--pass", action="append", dest="passes", choices=PASSES, help="may be repeated (default: all)")
    add("--key-dim", metavar="K", type=at_least(1), help="default: 128 (16 with rates)")
    add("--value-dim", metavar="V", type=at_least(1), help="default: 128 (1 with rates)")
    add("--heads", metavar="H", type=at_least(1), help="default: 32 (1536 with rates)")
    add(
        "--groups",
        metavar="G",
        type=at_least(1),
        help="groups of heads that share query and key (default: H; 1 with rates)",
    )
    add("--batch", metavar="B", type=at_least(1), default=1, help="default: 1")
    add(
        "--length",
        metavar="T",
        type=at_least(1),
        default=65_536,
        help="tokens; for a step, those before it (default: 65536)",
    )
    add("--dtype", choices=DTYPES, default=DTYPES[0], help=f"dtype of the operands (default: {DTYPES[0]})")
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--levels", metavar="L", type=at_least(1, MOST_LEVELS), help="level weights per token (default: what T needs)"
    )
    form.add_argument("--linear", action="store_true", help="use the linear operator, without level weights")
    other = parser.add_mutually_exclusive_group()
    other.add_argument(
        "--budgets", action="store_true", help="count what has a ceiling or a goal instead, and print both"
    )
    other.add_argument(
        "--calls",
        action="store_true",
        help="count instead what one eager call asks of the host (torch's operators and launches), by pass and family",
    )
    add("--compilations", action="store_true", help="also count compilations over lengths from 1 to 4096")
    add("--json", type=Path, metavar="FILE", help="also write all numbers to a file")
    parser.set_defaults(act=_cost)


def _cost(args: argparse.Namespace) -> int:
    if importlib.util.find_spec("triton") is None:
        raise KernelError("counting needs Triton (pip install triton); it needs no GPU")
    if os.environ.get("TRITON_INTERPRET"):
        raise KernelError("unset TRITON_INTERPRET: counting starts the interpreter in a process of its own")
    from llcompile.kernels.triton.cost import budgets, compilations, count, table

    _check_given(args)
    if args.budgets:
        print("\n".join(budgets.lines()))
        return 0
    if args.calls:
        from llcompile.commands import kernels_calls as calls

        chosen = (c for c in calls.CASES if c.family in (args.family or FAMILIES))
        print("\n".join(calls.lines(c for c in chosen if c.operation in (args.passes or PASSES))))
        return 0
    cases = [_case(args, f, p) for f, p in itertools.product(args.family or FAMILIES, args.passes or PASSES)]
    records = []
    for case in cases:
        found = count.cost(case)
        record = found.record()
        print("\n".join(table.lines(found)), flush=True)
        if args.compilations:
            record["compilations"] = by_kernel = compilations.compilations(case)
            print(
                f"compilations over {len(compilations.LENGTHS)} lengths: {sum(by_kernel.values())} of {len(by_kernel)}"
            )
        print()
        records.append(record)
    if args.json is not None:
        _write(args.json, records)
    return 0


def _check_given(args: argparse.Namespace) -> None:
    """Raise SpecError for what would have no effect, and for a file that cannot be written after minutes of work."""
    whole = "budgets" if args.budgets else "calls" if args.calls else None
    usual = {"json": None, "compilations": False}
    if args.budgets:
        usual |= {"family": None, "passes": None}
    for name, default in usual.items():
        if whole and getattr(args, name) != default:
            raise SpecError(f"--{name.replace('passes', 'pass')} has no effect with --{whole}: leave it out")
    if args.json is not None and not args.json.absolute().parent.is_dir():
        raise SpecError(f"--json {args.json}: cannot be written (no folder {args.json.parent}); name another file")


def _check_kernels(case: Any) -> None:
    """Raise SpecError where the operator would run such calls on ATen."""
    import torch

    from llcompile.kernels.description import Description
    from llcompile.kernels.triton.chips import DEFAULT
    from llcompile.kernels.triton.limits import beyond

    row, dtype = FAMILIES[case.family], getattr(torch, case.dtype)
    d = Description(row.decay, row.correction, case.key_dim, case.value_dim, dtype=dtype)
    if reason := beyond(d, DEFAULT):
        raise SpecError(f"--key-dim {d.key_dim}: there are no Triton kernels for it: {reason}; ATen runs such calls")


def _case(args: argparse.Namespace, family: str, operation: Any) -> Any:
    from llcompile.kernels.levels import level_count
    from llcompile.kernels.triton.cost.case import Case

    usual: dict[str, Any] = _RATES if family.startswith("rate") else _OTHERS
    sizes = {name: getattr(args, name) or default for name, default in usual.items()}
    levels = None if args.linear else args.levels or level_count(args.length + (operation in STEPS))
    sizes["groups"] = sizes["groups"] or sizes["heads"]
    case = Case(family, operation, batch=args.batch, length=args.length, dtype=args.dtype, levels=levels, **sizes)
    _check_kernels(case)
    return case


def _write(path: Path, records: list[dict[str, Any]]) -> None:
    import torch
    import triton

    found = {"versions": {"triton": triton.__version__, "torch": torch.__version__}, "passes": records}
    try:
        path.write_text(json.dumps(found, indent=1) + "\n")
    except OSError as error:
        raise SpecError(f"--json {path}: cannot be written ({error.strerror or error}); name another file") from error
