"""The command line: `llcompile COMMAND ...`. One row a command, each imported only when it is asked for."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llcompile
from llcompile.errors import ExampleError, LLCompileError, ReproError, SpecError, TrialError
from llcompile.kernels import progress

USAGE_ERROR = 2
# What another command line would mend.
_OF_THE_CALLER = (SpecError, ExampleError, TrialError, ReproError)


# Where `benchmarks/` and `examples/` lie in a clone of the repository: beside the package.
_BESIDE = Path(llcompile.__file__).resolve().parent.parent


@dataclass(frozen=True)
class Command:
    """One command: the module that has its `add_parser(subparsers)` and `run(args) -> int`, and its line of help.

    `folder` is where the module lies in a clone of the repository, for what the installed package does not contain.
    """

    name: str
    module: str
    help: str
    folder: str | None = None

    def load(self) -> Any:
        """The module.

        Raises:
            SpecError: it is in the repository, and this is an installed package.
        """
        if self.folder is not None:
            place = _BESIDE / self.folder
            if not (place / self.module).is_dir():
                raise SpecError(
                    f"`llcompile {self.name}` is not part of the installed package: it is in "
                    f"{Path(self.folder) / self.module}/ of llcompile's repository. Run it from a clone (`make demo` "
                    "there installs what it needs)."
                )
            if str(place) not in sys.path:
                sys.path.insert(0, str(place))
        return importlib.import_module(self.module)


COMMANDS = (
    Command("demo", "demo", "convert and train small transformers models and compare the results", "examples"),
    Command("bench", "benchmarks", "run a measurement on this machine", "."),
    Command("inspect", "llcompile.commands.inspect", "report which mixers would be converted (dry run)"),
    Command("trial", "llcompile.commands.trial", "train a model as it is and converted, and say whether it pays"),
    Command("kernels", "llcompile.commands.kernels", "show the generated kernels and compile them for a chip"),
    Command("repro", "llcompile.commands.repro", "write one mixer of a model to a standalone file"),
    Command("doctor", "llcompile.commands.doctor", "check the environment and explain what is missing"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 for an error of ours, 2 for an invalid command line."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = _asked_for(arguments)
    try:
        module = command.load() if command else None
        args = _parser(command, module).parse_args(arguments)
        if module is None:
            _parser(None, None).print_help()
            return 0
        with progress.told_to(progress.on_stderr):
            return int(module.run(args) or 0)
    except SystemExit as stop:  # argparse: --help, --version, or its own line about a wrong argument
        return stop.code if isinstance(stop.code, int) else USAGE_ERROR
    except LLCompileError as error:
        print(f"llcompile: {error}", file=sys.stderr)
        return USAGE_ERROR if isinstance(error, _OF_THE_CALLER) else 1
    except BrokenPipeError:  # who reads has seen enough, as `head` does; nothing is left to flush at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("llcompile: interrupted", file=sys.stderr)
        return 130


def _asked_for(arguments: list[str]) -> Command | None:
    name = next((argument for argument in arguments if not argument.startswith("-")), None)
    return next((command for command in COMMANDS if command.name == name), None)


def _parser(asked: Command | None, module: Any) -> argparse.ArgumentParser:
    parser = _OneLineParser(prog="llcompile", description="Log-linear attention for models with linear-time mixers.")
    parser.add_argument("--version", action="version", version=f"llcompile {llcompile.__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_OneLineParser)
    for command in COMMANDS:
        if module is not None and command is asked:
            module.add_parser(subparsers)
        else:
            subparsers.add_parser(command.name, help=command.help, add_help=False)
    return parser


class _OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, without the usage in front."""

    def error(self, message: str) -> Any:
        self.exit(USAGE_ERROR, f"{self.prog}: {message} (see {self.prog} --help)\n")


if __name__ == "__main__":
    sys.exit(main())
