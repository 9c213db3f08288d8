"""Convolutions over time: by a kernel, or through the Fourier transform."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from llcompile.patterns.mechanisms.facts import Facts, node_of
from llcompile.patterns.mechanisms.found import Found
from llcompile.patterns.structure.program import Value

# A kernel of this length is long whatever the example; a shorter one where it spans the whole example.
_LONG, _SPANNING = 128, 16
_TO_FREQUENCIES = {"_fft_r2c", "_fft_c2c"}


def find(facts: Facts) -> Iterator[Found]:
    """Every convolution over time of a graph."""
    for value in facts.values:
        name = facts.names[value]
        rule = RULES.get("convolution" if "causal_conv1d" in name else name)
        kind = rule(facts, value) if rule is not None else ""
        if kind:
            yield Found(node_of(value), kind, frozenset((value,)))


def _of_kernel(facts: Facts, value: Value) -> str:
    source, weight = [*facts.inputs(value), value, value][:2]
    kernel, length = weight.shape[-1], min(source.shape[-1], value.shape[-1])
    over_time = len(weight.shape) < 4 and not _is_transposed(value) and source in facts.activations
    if not over_time or kernel <= 1:  # of images; upwards; a linear map
        return ""
    if facts.times.along(source, -2) and not facts.times.along(source, -1):  # along the features
        return ""
    long = kernel >= _LONG or kernel >= max(length, _SPANNING)
    return f"{'long' if long else 'short'} convolution (kernel {kernel})"


def _is_transposed(value: Value) -> bool:
    return value.op is not None and value.op.name == "convolution" and bool(value.op.args[6])


def _of_spectra(facts: Facts, value: Value) -> str:
    """A product of two spectra, or of one and a learned filter, transformed back."""
    stop = lambda v: facts.is_projection(v) or facts.names[v] in _TO_FREQUENCIES  # noqa: E731
    above = list(facts.above(value, stop, 48))[1:]
    spectra = [v for v in above if facts.names[v] in _TO_FREQUENCIES]
    products = [v for v in above if facts.names[v] in ("mul", "bmm") and not facts.learned.isdisjoint(facts.inputs(v))]
    return "FFT convolution" if len(spectra) > 1 or products else ""


def _of_transform(facts: Facts, value: Value) -> str:
    """A transform over several axes at once mixes by itself; one back to time, where spectra were multiplied."""
    assert value.op is not None
    several, back = len(value.op.args[1]) > 1, value.op.name == "_fft_c2r" or value.op.args[3] is False
    if several:
        return "" if back or value not in facts.activations else "Fourier mixing (FNet)"
    return _of_spectra(facts, value) if back else ""


# Operation -> what it is called.
RULES: dict[str, Callable[[Facts, Value], str]] = {
    "convolution": _of_kernel,
    **dict.fromkeys(("_fft_r2c", "_fft_c2r", "_fft_c2c"), _of_transform),
}
