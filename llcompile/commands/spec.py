"""SPEC: the model that is named on the command line, and its example inputs."""

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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llcompile.arguments import at_least, check_device, in_a_line
from llcompile.commands import hub
from llcompile.errors import ExampleError, SpecError

if TYPE_CHECKING:
    from torch import nn

Example = tuple[Any, tuple[Any, ...]]

SPEC_HELP = """SPEC is one of:
  a folder with config.json, or such a file   a transformers model with random weights
  a transformers model_type                   such as mamba2; default sizes unless changed by --set
  org/name                                    the config of a model on the Hugging Face Hub (random weights)
  package.module:factory                      a function without arguments that returns (model, *example_inputs)"""

_EXPECTED = "expected a config.json, a model_type of transformers, org/name on the Hub, or module:factory"
_LENGTH, _DEVICE = 64, "meta"


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that name a model, for every command that takes one."""
    parser.add_argument("spec", metavar="SPEC", help="a config, a model_type, org/name or module:factory; see below")
    add_set_argument(parser)
    parser.add_argument("--length", type=at_least(1), help=f"tokens in the example input (default {_LENGTH})")
    parser.add_argument(
        "--device", help=f"device to build a transformers model on (default {_DEVICE}: no memory, no values)"
    )


def add_set_argument(parser: argparse.ArgumentParser) -> None:
    """Add --set."""
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="override an entry of the config (VALUE is JSON)",
    )


def load_asked(args: argparse.Namespace, device: str | None = None) -> Example:
    """The model and example inputs that the arguments of `add_model_arguments` name, on `device` if given.

    Raises:
        SpecError: as for `load`; or an argument that has no effect on this SPEC.
    """
    if is_factory(args.spec):
        for flag in ("length", "device"):
            if getattr(args, flag) is not None:
                raise SpecError(f"--{flag} has no effect on {args.spec}: change what the function returns")
    return load(args.spec, args.set, args.length or _LENGTH, device or args.device or _DEVICE)


@contextlib.contextmanager
def explained(args: argparse.Namespace) -> Iterator[None]:
    """Where a model of transformers does not run inside, the error says what to change on the command line."""
    try:
        yield
    except ExampleError as error:
        if is_factory(args.spec):
            raise
        raise ExampleError(
            f"{in_a_line(error)} On the command line: change --set or --length; for a model that takes other inputs "
            "than tokens, name a function that returns (model, *inputs), module:factory."
        ) from error


def is_factory(spec: str) -> bool:
    """Whether SPEC names a function, and not a config."""
    return ":" in spec and not Path(spec).exists()


def load(spec: str, changes: list[str], length: int, device: str) -> Example:
    """The model and example inputs that SPEC names.

    Args:
        spec: see `SPEC_HELP`.
        changes: KEY=VALUE, entries of the config.
        length: tokens T of the example input [1, T] of a transformers model.
        device: where a transformers model is built.

    Raises:
        SpecError: SPEC names nothing that can be found or built.
    """
    path = Path(spec)
    if is_factory(spec):
        if changes:
            raise SpecError(f"--set {changes[0]}: {spec} has no config; change what the function returns")
        return _from_factory(spec)
    if spec and (path.is_dir() or path.suffix == ".json"):
        return _from_config(lambda: _read_config(path), changes, length, device)
    if path.is_file():
        module = ".".join(path.with_suffix("").parts)
        hint = f"name a function in it, {module}:FUNCTION" if path.suffix == ".py" else "a config ends in .json"
        raise SpecError(f"{spec} is a file, but no config: {hint}")
    if hub.is_id(spec):
        return _from_config(lambda: hub.config(spec, _transformers()), changes, length, device)
    return _from_config(lambda: _named_config(spec), changes, length, device)


def load_model(spec: str, changes: list[str], device: str) -> nn.Module:
    """The model that SPEC names, where nothing depends on example inputs: a factory may leave them out.

    Raises:
        SpecError: SPEC names nothing that can be found or built.
    """
    if not is_factory(spec) or changes:
        model: nn.Module = load(spec, changes, _LENGTH, device)[0]
        return model
    made = _factory_result(spec)
    found = made[0] if isinstance(made, tuple) and made else made
    from torch import nn

    if not isinstance(found, nn.Module):
        raise SpecError(f"{spec} returned a {type(found).__name__}; expected an nn.Module, or (model, *inputs)")
    return found


def _from_factory(spec: str) -> Example:
    made = _factory_result(spec)
    if not isinstance(made, tuple) or len(made) < 2:
        found = f"a tuple of {len(made)}" if isinstance(made, tuple) else type(made).__name__
        raise SpecError(f"{spec} returned {found}; expected a tuple (model, *example_inputs)")
    from torch import nn

    if not isinstance(made[0], nn.Module):
        raise SpecError(
            f"{spec} returned ({type(made[0]).__name__}, ...); expected (model, *example_inputs) with an nn.Module"
        )
    return made[0], made[1:]


def _factory_result(spec: str) -> Any:
    """What the function that SPEC names returns."""
    module_name, _, name = spec.partition(":")
    if not module_name or not name:
        raise SpecError(f"{spec!r}: {_EXPECTED}")
    if module_name.endswith(".py"):
        written = ".".join(Path(module_name).with_suffix("").parts)
        raise SpecError(f"{spec}: write the module as in an import statement, {written}:{name}")
    return _made(spec, _find(module_name, name))


def _find(module_name: str, name: str) -> Any:
    sys.path.insert(0, os.getcwd())  # as `python -m` does; a console script does not
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # whatever the user's file raises
        kind = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
        raise SpecError(f"cannot import {module_name!r}: {kind}{error}") from error
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(os.getcwd())
    if not hasattr(module, name):
        raise SpecError(f"module {module_name!r} has no {name!r}{_nearest(name, [*vars(module)])}")
    return getattr(module, name)


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
    except (Exception, SystemExit) as error:
        line = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{line.filename}:{line.lineno} in {line.name}"
        raise SpecError(f"{spec} raised {type(error).__name__}: {error} ({where})") from error


def _from_config(read: Callable[[], Any], changes: list[str], length: int, device: str) -> Example:
    import torch

    check_device(device)
    config = read()
    config.use_cache = False  # one forward pass; a cache would only add to what is traced
    for change in changes:
        _change(config, change)
    from transformers import AutoModel, AutoModelForCausalLM

    try:
        with torch.device(device):
            known = type(config) in AutoModelForCausalLM._model_mapping
            model = (AutoModelForCausalLM if known else AutoModel).from_config(config).eval()
            return model, (torch.zeros(1, length, dtype=torch.long),)
    except Exception as error:
        raise SpecError(f"cannot build a {type(config).__name__}: {in_a_line(error)}") from error


def _change(config: Any, change: str) -> None:
    """Set one entry of a config, KEY=VALUE."""
    key, equals, text = change.partition("=")
    name = type(config).__name__
    if not key or not equals:
        raise SpecError(f"--set {change}: expected KEY=VALUE with a KEY of {name}, such as hidden_size=64")
    keys = {*config.to_dict(), *config.attribute_map} - {"model_type", "transformers_version"}
    if key not in keys:
        raise SpecError(f"--set {change}: {name} has no such KEY{_nearest(key, [*keys])} (expected KEY=VALUE)")
    value: Any = text
    with contextlib.suppress(json.JSONDecodeError):
        value = json.loads(text)
    try:
        setattr(config, key, value)
    except Exception as error:
        raise SpecError(f"--set {change}: {in_a_line(error)} (VALUE is JSON, or else a string)") from error


def _read_config(path: Path) -> Any:
    transformers = _transformers()
    file = path / "config.json" if path.is_dir() else path
    try:
        values = json.loads(file.read_text())
        if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
            raise SpecError(f'{file} is not a transformers config: it has no model_type, such as "mamba2"')
        kind = type(transformers.AutoConfig.for_model(values["model_type"]))
        return kind.from_json_file(file)  # which reads its numbers that JSON has not, such as infinity
    except FileNotFoundError:
        raise SpecError(f"{file} does not exist; {_EXPECTED}") from None
    except SpecError:
        raise
    except Exception as error:  # of the file, of its text, or of a value in it
        raise SpecError(f"{file} is not a transformers config: {in_a_line(error)}") from error


def _named_config(name: str) -> Any:
    transformers = _transformers()
    known = list(transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES)
    if name not in known:
        hint = _nearest(name, known) or f"; {_EXPECTED}"
        raise SpecError(f"{name!r} is not a file, a module:factory or a model_type of transformers{hint}")
    return transformers.AutoConfig.for_model(name)


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name.lower(), known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise SpecError("this needs transformers: pip install 'llcompile[transformers]'") from None
    return transformers
