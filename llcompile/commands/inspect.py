"""`llcompile inspect SPEC`: the report of a model that is named on the command line."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llcompile.errors import SpecError
from llcompile.look import files

if TYPE_CHECKING:
    from llcompile.look.look import Look

Example = tuple[Any, tuple[Any, ...]]

SPEC_HELP = """SPEC is one of:
  a folder with config.json, or such a file   a transformers model with random weights
a transformers model_type                   such as mamba2; default sizes unless changed by --set
  package.module:factory                      a function without arguments that returns (model, *example_inputs)"""


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


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that name a model, for every command that takes one."""
    parser.add_argument("spec", metavar="SPEC", help="a config, a model_type, or module:factory; see below")
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="override an entry of the config (VALUE is JSON)",
    )
    parser.add_argument("--length", type=int, default=64, help="tokens in the example input (default 64)")
    parser.add_argument(
        "--device", default="meta", help="device to build a transformers model on (default meta: no memory, no values)"
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

        model, example = load(args.spec, args.set, args.length, args.device)
        stage(f"looking at {type(model).__name__}")
        import llcompile

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
        files.write_text(args.mlir, look.to_mlir(args.dialect, args.mixer) + "\n")
    if args.kernels:
        folder = files.make_folder(args.kernels)
        for kernels in look.kernels:
            for target, source in kernels.sources.items():
                suffix = ".cpp" if target == "cpu" else ".py"
                files.write_text(folder / f"{kernels.name}_{target}{suffix}", source)
    if args.html:
        look.to_html(args.html)


def load(spec: str, changes: list[str], length: int, device: str) -> Example:
    """The model and example inputs that SPEC names.

    Raises:
        SpecError: SPEC names nothing that can be found or built.
    """
    path = Path(spec)
    if path.is_dir() or path.suffix == ".json":
        return _from_config(lambda: _read_config(path), changes, length, device)
    if ":" in spec:
        return _from_factory(spec)
    return _from_config(lambda: _named_config(spec), changes, length, device)


def _from_factory(spec: str) -> Example:
    module_name, _, name = spec.partition(":")
    sys.path.insert(0, os.getcwd())  # as `python -m` does; a console script does not
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's file raises
        kind = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
        raise SpecError(f"cannot import {module_name!r}: {kind}{error}") from error
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(os.getcwd())
    if not hasattr(module, name):
        raise SpecError(f"module {module_name!r} has no {name!r}")
    made = _made(spec, getattr(module, name))
    if not isinstance(made, tuple) or len(made) < 2:
        raise SpecError(f"{spec} returned {type(made).__name__}; expected a tuple (model, *example_inputs)")
    return made[0], made[1:]


def _made(spec: str, factory: Any) -> Any:
    if not callable(factory):
        raise SpecError(f"{spec} is a {type(factory).__name__}; expected a function that returns (model, *inputs)")
    try:
        inspect.signature(factory).bind()
    except TypeError:
        needed = inspect.signature(factory)
        raise SpecError(f"{spec}{needed} needs arguments; name a function that needs none") from None
    except ValueError:  # a builtin that does not say what it takes
        pass
    try:
        return factory()
    except Exception as error:
        line = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{line.filename}:{line.lineno} in {line.name}"
        raise SpecError(f"{spec} raised {type(error).__name__}: {error} ({where})") from error


def _from_config(read: Callable[[], Any], changes: list[str], length: int, device: str) -> Example:
    import torch

    config = read()
    config.use_cache = False  # one forward pass; a cache would only add to what is traced
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals or not hasattr(config, key):
            raise SpecError(f"--set {change}: expected KEY=VALUE with a KEY of {type(config).__name__}")
        with contextlib.suppress(json.JSONDecodeError):
            text = json.loads(text)
        setattr(config, key, text)
    from transformers import AutoModel, AutoModelForCausalLM

    try:
        with torch.device(device):
            known = type(config) in AutoModelForCausalLM._model_mapping
            model = (AutoModelForCausalLM if known else AutoModel).from_config(config).eval()
            return model, (torch.zeros(1, length, dtype=torch.long),)
    except Exception as error:
        raise SpecError(f"cannot build a {type(config).__name__}: {error}") from error


def _read_config(path: Path) -> Any:
    transformers = _transformers()
    file = path / "config.json" if path.is_dir() else path
    try:
        values = json.loads(file.read_text())
        return transformers.AutoConfig.for_model(**values)
    except FileNotFoundError:
        raise SpecError(f"{file} does not exist") from None
    except (ValueError, TypeError) as error:
        raise SpecError(f"{file} is not a transformers config: {error}") from error


def _named_config(name: str) -> Any:
    transformers = _transformers()
    known = list(transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise SpecError(f"{name!r} is not a file, a module:factory or a model_type of transformers{hint}")
    return transformers.AutoConfig.for_model(name)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise SpecError("this needs transformers: pip install 'llcompile[transformers]'") from None
    return transformers
