"""`llcompile inspect SPEC`: the report of a model that is named on the command line."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from llcompile.commands.spec import SPEC_HELP, add_model_arguments, explained, load_asked
from llcompile.errors import SpecError
from llcompile.look import files

if TYPE_CHECKING:
    from llcompile.look.look import Look


def add_parser(subparsers: Any) -> None:
    """Add this command to the command line."""
    parser = subparsers.add_parser(
        "inspect",
        help="report which mixers would be converted (dry run)",
        description="Report which mixers of a model would be converted, and why the others would not (dry run).",
        epilog=SPEC_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--strict", action="store_true", help="exit with code 1 if a linear-time mixer would not be converted"
    )
    parser.add_argument("--html", metavar="FILE", help="write an HTML page that shows each mixer")
    parser.add_argument("--json", metavar="FILE", help="write the report as JSON (- for standard output)")
    parser.add_argument("--mlir", metavar="FILE", help="write the rewritten model as MLIR (weights need --device cpu)")
    parser.add_argument(
        "--dialect", choices=("torch", "linalg"), default="torch", help="dialect of --mlir (default: torch)"
    )
    parser.add_argument("--mixer", metavar="NAME", help="with --mlir, write only the module of this mixer")
    parser.add_argument(
        "--kernels",
        metavar="DIR",
        help="write the generated kernels to a folder, one file per kind and target",
    )
    parser.add_argument(
        "--chip", metavar="CHIP", action="append", default=[], help="compile the kernels for a chip (sm_90, gfx942)"
    )


def run(args: argparse.Namespace) -> int:
    """Print the report and write the files; 1 under --strict if a mixer would not be converted."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    _check_outputs(args)
    console = Console(stderr=True)
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"building {args.spec}")

        def stage(text: str) -> None:
            progress.update(task, description=text)

        model, example = load_asked(args)
        stage(f"looking at {type(model).__name__}")
        import llcompile

        with explained(args):
            look = llcompile.inspect(model, *example)
        for file in look.kernels:
            for chip in args.chip:
                stage(f"compiling {file.name} for {chip}")
                file.resources(chip)
        stage("writing")
        _write(look, args)
    if args.json != "-":
        print(look)
    return int(args.strict and (bool(look.declined) or not (look.converted or look.untouched)))


def _check_outputs(args: argparse.Namespace) -> None:
    """Fail before the work, not after it, if an output cannot be written."""
    for path in (args.html, args.json, args.mlir):
        if path and path != "-":
            files.check_target(path)
    if args.html:
        from llcompile.look.page import check_libraries

        check_libraries()
    if args.mlir:
        from llcompile.look.mlir import importer

        importer()
    elif args.mixer is not None:
        raise SpecError(f"--mixer {args.mixer}: it names what --mlir FILE writes; add --mlir")
    if args.kernels:
        files.check_folder(args.kernels)
    if args.chip:
        from llcompile.kernels.triton.chips import CHIPS

        unknown = [chip for chip in args.chip if chip not in CHIPS]
        if unknown:
            raise SpecError(f"--chip {unknown[0]}: unknown chip; known: {', '.join(CHIPS)}")


def _write(look: Look, args: argparse.Namespace) -> None:
    if args.json:
        text = json.dumps(look.to_dict(), indent=2, default=str) + "\n"
        if args.json == "-":
            sys.stdout.write(text)
        else:
            files.write_text(args.json, text)
    if args.mlir:
        known = [mixer.module for mixer in look.mixers]
        if args.mixer is not None and args.mixer not in known:
            raise SpecError(f"--mixer {args.mixer}: the model has no such mixer; known: {', '.join(known) or 'none'}")
        files.write_text(args.mlir, look.to_mlir(args.dialect, args.mixer) + "\n")
    if args.kernels:
        folder = files.make_folder(args.kernels)
        for kernels in look.kernels:
            for target, source in kernels.sources.items():
                suffix = ".cpp" if target == "cpu" else ".py"
                files.write_text(folder / f"{kernels.name}_{target}{suffix}", source)
    if args.html:
        look.to_html(args.html)
