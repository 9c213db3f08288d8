"""MLIR: a rewritten mixer or the whole model, by torch-mlir; the operator is written out in its parallel form."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from llcompile.errors import LevelWeightsIgnoredWarning, MissingLibraryError, MlirError
from llcompile.kernels.aten.parallel import parallel_attention
from llcompile.kernels.operands import DIFFERENTIABLE, Operands
from llcompile.look.findings import Findings

# Our names for the dialects, and torch-mlir's.
DIALECTS = {"torch": "torch", "linalg": "linalg-on-tensors"}
_SEQUENCE = "llcompile::loglinear_attention"


def to_mlir(look: Findings, dialect: str = "torch", mixer: str | None = None) -> str:
    """The rewritten model, or the module of one of its mixers, as the text of a verified MLIR module.

    The function `main` takes the tensors that the example was run on, at their sizes, and has the weights in it as
    constants. The operator stands there in plain operations whose cost is quadratic in the length
    (`llcompile.kernels.aten.parallel`): MLIR has no operator of ours to call.

    Args:
        look: what `llcompile.inspect` returned.
        dialect: "torch", or "linalg" for linalg on tensors.
        mixer: name of the module that owns a mixer, as the report has it; None is the whole model.

    Raises:
        MissingLibraryError: torch-mlir is not installed.
        MlirError: an unknown dialect or mixer, weights without values, a graph that torch-mlir does not take.
    """
    if dialect not in DIALECTS:
        raise MlirError(f"unknown dialect {dialect!r}; use one of {', '.join(map(repr, DIALECTS))}")
    fx_importer = importer()
    program = _decomposed(_exported(look, mixer))
    try:
        module = fx_importer.export_and_import(program, output_type=DIALECTS[dialect])
        module.operation.verify()
    except Exception as error:
        what = str(error).strip().split("\n")[0]
        raise MlirError(
            f"torch-mlir cannot import {_called(mixer)} as {dialect!r}: {what}. Its own message is above; "
            "dialect='torch', or another mixer, may work."
        ) from error
    return str(module)


def importer() -> Any:
    """What imports programs in torch-mlir; raises MissingLibraryError where that is not installed."""
    try:
        from torch_mlir import fx
    except ImportError as error:
        raise MissingLibraryError(
            "MLIR needs torch-mlir: pip install 'llcompile[mlir]' (or pip install torch-mlir, whose wheels are for "
            f"Linux and CPython). The error was: {error}"
        ) from error
    return fx


def _exported(look: Findings, mixer: str | None) -> ExportedProgram:
    """The rewritten program of the model, or of the module that owns the mixer; the model is as it was afterwards."""
    subject = look.subject
    assert subject is not None
    model, args, kwargs = subject.model, subject.args, dict(subject.kwargs)
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise MlirError("the model is on the device meta, so its weights have no values; inspect it on cpu (--device)")
    names = [record.module for record in look.converted]
    if mixer is not None and mixer not in names:
        raise MlirError(f"no converted mixer is named {mixer!r}; known: {', '.join(map(repr, names)) or 'none'}")
    try:
        with subject.converted():
            part, args, kwargs = _part(model, mixer, args, kwargs)
            with torch.no_grad():
                return torch.export.export(part, args, kwargs)
    except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:
        raise MlirError(f"{_called(mixer)} cannot be exported: {str(error).strip().splitlines()[0]}") from error


def _part(model: nn.Module, mixer: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The module to export, and what it is called with in a run of the model."""
    if not mixer:
        return model, args, kwargs
    part, calls = model.get_submodule(mixer), []
    hook = part.register_forward_pre_hook(lambda _, *given: calls.append(given), with_kwargs=True)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", LevelWeightsIgnoredWarning)  # only the inputs are wanted
            model(*args, **kwargs)
    finally:
        hook.remove()
    if not calls:
        raise MlirError(f"{mixer} is not called as a module when the model runs; export the whole model")
    return part, *calls[0]


def _decomposed(program: ExportedProgram) -> ExportedProgram:
    """The program with the operator in plain operations."""
    calls = [node for node in program.graph.nodes if str(node.target).startswith("llcompile.")]
    if not calls:
        raise MlirError("nothing was rewritten in it, so there is no operator to show")
    for node in calls:
        at = DIFFERENTIABLE
        name, initial_state, keeps_state = node.target._schema.name, node.args[at - 1 : at], node.args[at + 1 : at + 2]
        packed = any(x is not None for x in node.args[at + 2 :])
        if name != _SEQUENCE or initial_state != (None,) or keeps_state != (False,) or packed:
            raise MlirError(
                f"{name} with states or packed sequences has no parallel form; use an example without a cache "
                "(use_cache=False) and without a mask"
            )
    table = torch.export.default_decompositions()
    table[torch.ops.llcompile.loglinear_attention.default] = _parallel
    with torch.no_grad():
        return program.run_decompositions(table)


def _parallel(*given: Any) -> tuple[Tensor, Tensor]:
    x, scale = Operands(*given[:DIFFERENTIABLE]), given[DIFFERENTIABLE]
    return parallel_attention(x, scale), x.q.new_empty(0)


def _called(mixer: str | None) -> str:
    return f"the mixer {mixer}" if mixer else "the model"
