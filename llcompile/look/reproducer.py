"""A reproducer: one Python file with a mixer's original code, its operands and the proof, for a bug report."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from llcompile import __version__
from llcompile.errors import ReproError
from llcompile.look.collect import region_nodes
from llcompile.look.region_source import RegionSource, region_source
from llcompile.look.source_text import in_docstring
from llcompile.passes.candidate import CallCandidate
from llcompile.passes.session import Session


@dataclass(frozen=True)
class _Piece:
    """What the file is about: the mixer's module, what became of it, and its code."""

    module: str
    fate: str
    where: str
    source: RegionSource


class Reproducer:
    """The file about one mixer of a model, made of the graphs that it visits.

    Args:
        mixer: the module that has the mixer or the near miss, as the report names it.
    """

    def __init__(self, mixer: str) -> None:
        self.mixer = mixer
        self._piece: _Piece | None = None
        self._names: dict[str, None] = {}

    def visit(self, session: Session) -> None:
        """Looks for the mixer in one graph.

        Raises:
            ReproError: its code cannot be written as one file.
        """
        for module, fate, where, nodes, result in _all(session):
            self._names[module] = None
            if module == self.mixer and nodes and self._piece is None:
                self._piece = _Piece(module, fate, where, region_source(nodes, result))

    def text(self, model: str) -> str:
        """The text of the file; `model` is the class of the model.

        Raises:
            ReproError: no graph had a mixer of that name.
        """
        if self._piece is None:
            known = ", ".join(name or "''" for name in self._names) or "none"
            raise ReproError(f"no linear-time mixer in {model} is named {self.mixer!r}; known: {known}")
        return _text(self._piece, model)


def _all(session: Session) -> Iterator[tuple[str, str, str, list[fx.Node], fx.Node | None]]:
    """Module, fate, line, nodes and result of everything that the report names."""
    order = {node: i for i, node in enumerate(n for region in session.regions for n in region.graph.nodes)}
    for candidate in session.candidates:
        fate = f"converted, {candidate.family}" if candidate.open else f"declined, {candidate.reason}"
        if candidate.certificate is not None:
            fate += f"; the proof's largest error was {candidate.certificate.max_error:.1e}"
        yield (
            candidate.module,
            fate,
            candidate.where,
            _sorted(region_nodes(candidate), order),
            None if isinstance(candidate, CallCandidate) else candidate.node,
        )
    for record in session.near_misses:
        nodes = _sorted(session.missed_nodes.get(record, frozenset()), order)
        yield record.module, f"declined, {record.reason}", record.where, nodes, None


def _sorted(nodes: Any, order: dict[fx.Node, int]) -> list[fx.Node]:
    return sorted((node for node in nodes if node in order), key=order.__getitem__)


def _text(piece: _Piece, model: str) -> str:
    named = piece.module or "(root)"
    buffers = [line.split(" = ", 1) for line in piece.source.buffers]
    packs = any(value.startswith("unpacked(") for _, value in buffers)
    init = [_INIT, *(f"        self.register_buffer({name!r}, {value})" for name, value in buffers), ""]
    return _FILE.format(
        title=in_docstring(f"Reproducer of {named} of {model} ({piece.where})."),
        # Broken at spaces alone: a break inside of an escape would end it.
        fate=textwrap.fill(
            in_docstring(f"In the model it was {piece.fate}."), 110, break_long_words=False, break_on_hyphens=False
        ),
        versions=f"llcompile {__version__}, torch {torch.__version__}",
        imports="\n".join((*(("import base64", "import zlib", "") * packs), "import torch", *piece.source.imports)),
        code="\n".join([*(init if buffers else ()), textwrap.indent(piece.source.code, "    ")]),
        operands=textwrap.indent("\n".join(piece.source.operands), "    "),
        helper=_UNPACKED if packs else "",
        names=", ".join(line.split(" = ")[0] for line in piece.source.operands),
    )


_FILE = '''"""{title}

{fate}
Written by {versions}. Needs both, and the library whose function it calls, if any.
"""

{imports}

import llcompile


{helper}class Region(torch.nn.Module):
    """The code of the mixer, from the output of its projections to its result."""

{code}


def operands():
    """Random numbers in the shapes of the model."""
{operands}
    return {names},


def tensors(result):
    """All results."""
    return [part for part in (result if isinstance(result, tuple) else (result,)) if isinstance(part, torch.Tensor)]


def main():
    """Inspect the region alone, and compare it with its rewritten form at w = 1."""
    torch.manual_seed(0)
    region, given = Region(), operands()
    report = llcompile.inspect(region, *given)
    print(report)
    if report.converted:
        llcompile.convert(region, *given)
        compiled = torch.compile(region, backend="loglinear", options={{"inner": "eager"}})
        with torch.no_grad():
            pairs = zip(tensors(region(*given)), tensors(compiled(*given)), strict=True)
        # A state now has levels, and therefore another shape.
        alike = [(expected, actual) for expected, actual in pairs if expected.shape == actual.shape]
        error = max(float((actual - expected).abs().max() / expected.abs().max()) for expected, actual in alike)
        print(f"largest difference of the rewritten region at w = 1: {{error:.1e}}")


if __name__ == "__main__":
    main()
'''

_INIT = """    def __init__(self):
        super().__init__()"""

_UNPACKED = '''def unpacked(shape, dtype, *lines):
    """The values of a buffer."""
    data = zlib.decompress(base64.b64decode("".join(lines)))
    return torch.frombuffer(bytearray(data), dtype=dtype).view(shape)


'''
