"""Convolutions over time: by a kernel, or through the Fourier transform."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from llcompile.patterns.mechanisms.axes import TimeAxes
from llcompile.patterns.mechanisms.facts import Facts
from llcompile.patterns.mechanisms.found import Found
from llcompile.patterns.mechanisms.vocabulary import CONVOLUTIONS, PROJECTIONS

# A kernel of this length is long whatever the example; a shorter one where it spans the whole example.
_LONG, _SPANNING = 128, 16
_TO_FREQUENCIES = {"fft_fft", "fft_rfft"}
_FROM_FREQUENCIES = {"fft_ifft", "fft_irfft"}
_MIXING = {"fft_fft2", "fft_fftn", "fft_rfft2", "fft_rfftn"}


def find(facts: Facts, axes: TimeAxes) -> Iterator[Found]:
    """Every convolution over time of a graph."""
    for node in facts.nodes:
        name = facts.names[node]
        kind = ""
        if name in CONVOLUTIONS or "causal_conv1d" in name:
            kind = _of_kernel(facts, axes, node)
        elif name in _FROM_FREQUENCIES:
            kind = _of_spectra(facts, node)
        elif name in _MIXING and node in facts.activations:
            kind = "Fourier mixing (FNet)"
        if kind:
            yield Found(node, kind, inside=frozenset((node,)))


def _of_kernel(facts: Facts, axes: TimeAxes, node: fx.Node) -> str:
    given = [node.args[i] if len(node.args) > i else node.kwargs.get(n) for i, n in enumerate(("input", "weight"))]
    source, weight = (n if isinstance(n, fx.Node) else None for n in given)
    if source is None or weight is None or source not in facts.activations or weight not in facts.shapes:
        return ""
    kernel, known = facts.shapes[weight][-1], axes.known(source)
    if kernel <= 1 or (-2 in known and -1 not in known):  # a linear map, or along the features
        return ""
    length = min(facts.shapes[source][-1], facts.shapes.get(node, facts.shapes[source])[-1])
    if kernel >= _LONG or kernel >= max(length, _SPANNING):
        return f"long convolution (kernel {kernel})"
    return f"short convolution (kernel {kernel})"


def _of_spectra(facts: Facts, node: fx.Node) -> str:
    """A product of two spectra, transformed back."""
    above = facts.above(node, lambda n: facts.names[n] in PROJECTIONS | _TO_FREQUENCIES, 32)
    spectra = [n for n in above if facts.names[n] in _TO_FREQUENCIES]
    return "FFT convolution" if len(spectra) > 1 or _is_filtered(facts, node) else ""


def _is_filtered(facts: Facts, node: fx.Node) -> bool:
    """Whether a spectrum is multiplied by a learned filter before it is transformed back."""
    above = facts.above(node, lambda n: facts.names[n] in PROJECTIONS | _TO_FREQUENCIES, 32)
    return any(facts.names[n] in ("mul", "einsum") and not facts.learned.isdisjoint(facts.inputs[n]) for n in above)
