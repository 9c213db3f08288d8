"""`llcompile repro SPEC --mixer NAME`: a file that shows one mixer of a model by itself, for a bug report."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from llcompile import files
from llcompile.commands.inspect import SPEC_HELP, add_model_arguments, load
from llcompile.errors import ReproError


def add_parser(subparsers: Any) -> None:
    """Add this command to the command line."""
    parser = subparsers.add_parser(
        "repro",
        help="write one mixer of a model to a standalone file, for a bug report",
        description="Write a Python file with the code of a mixer, or of a near miss, its operands and the proof.",
        epilog=SPEC_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(parser)
    parser.add_argument("--mixer", metavar="NAME", required=True, help="module name, as printed by `llcompile inspect`")
    parser.add_argument(
        "--out", metavar="FILE", default="repro.py", help="file to write (default repro.py; - for standard output)"
    )


def run(args: argparse.Namespace) -> int:
    """Write the file."""
    if args.out != "-":
        files.check_target(args.out)
    text = _text(args)
    if args.out == "-":
        sys.stdout.write(text)
    else:
        print(f"wrote {files.write_text(args.out, text)}; python {args.out} runs it")
    return 0


def _text(args: argparse.Namespace) -> str:
    from llcompile.look.repro import reproducer

    model, example = load(args.spec, args.set, args.length, args.device)
    try:
        return reproducer(model, example, {}, args.mixer)
    except ReproError:
        # On meta nothing costs memory, but a mask or a table of decays has no numbers, and some mixers need them.
        if not any(parameter.is_meta for parameter in model.parameters()):
            raise
    model, example = load(args.spec, args.set, args.length, "cpu")
    return reproducer(model, example, {}, args.mixer)
