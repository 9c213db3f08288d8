"""`llcompile repro SPEC --mixer NAME`: a file that shows one mixer of a model by itself, for a bug report."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from llcompile.commands.spec import SPEC_HELP, add_model_arguments, explained, load_asked
from llcompile.errors import ReproError
from llcompile.look import files


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


def reproducer(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], mixer: str) -> str:
    """The text of the file about one mixer of a model.

    Raises:
        ReproError: the report has nothing of that name, or its code cannot be written as one file.
        CaptureError: as for `llcompile.inspect`.
    """
    from llcompile.conversion import visit_graphs
    from llcompile.look.reproducer import Reproducer

    made = Reproducer(mixer)
    visit_graphs(model, args, kwargs, made.visit)
    return made.text(type(model).__name__)


def _text(args: argparse.Namespace) -> str:
    model, example = load_asked(args)
    try:
        with explained(args):
            return reproducer(model, example, {}, args.mixer)
    except ReproError:
        # On meta nothing costs memory, but a mask or a table of decays has no numbers, and some mixers need them.
        if not any(parameter.is_meta for parameter in model.parameters()):
            raise
    model, example = load_asked(args, "cpu")
    return reproducer(model, example, {}, args.mixer)
