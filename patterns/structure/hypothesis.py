"""Hypothesis: a subgraph of a program understood as a mixer: which live-in is which operand, and on which axes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from llcompile.patterns.families import Correction, Decay
from llcompile.patterns.mixer import Mixer
from llcompile.patterns.structure.axes import Axes, Axis, Dim, dims_of
from llcompile.patterns.structure.lifted import LiveIn
from llcompile.patterns.structure.sizing import CannotArrange, arrange
from llcompile.patterns.structure.transforms import Transform

Size = Callable[[Dim], Any]

# What may stand in the denominator d of normalised linear attention, with e the epsilon, and s() the sum of the query's
# features: q . (sum of keys + e) is d + e s.
NORMALISERS: dict[str, Callable[[Any, float, Callable[[], Any]], Any]] = {
    "d + e": lambda d, e, s: d + e,
    "max(d, e)": lambda d, e, s: torch.clamp_min(d, e),
    "|d| + e": lambda d, e, s: torch.abs(d) + e,
    "max(|d|, e)": lambda d, e, s: torch.clamp_min(torch.abs(d), e),
    "d + e s": lambda d, e, s: d + e * s(),
}


# What is done to the output o with a live-in x.
POSTS: dict[str, Callable[[Any, Any], Any]] = {
    "plus": lambda o, x: o + x,
    "times": lambda o, x: o * x,
    "over": lambda o, x: o / x,
    "times exp": lambda o, x: o * torch.exp(x),
    "over exp": lambda o, x: o * torch.exp(-x),
}


@dataclass(frozen=True)
class MixerAxes:
    """The dims of the operator's axes. `groups` are the heads that queries and keys have, `rest` those they share."""

    batch: Axis
    time: Axis
    groups: Axis
    rest: Axis
    key: Axis
    value: Axis

    @property
    def heads(self) -> Axis:
        """All heads, the groups outermost."""
        return (*self.groups, *self.rest)


@dataclass(frozen=True)
class Hypothesis:
    """Which live-in is which operand.

    Args:
        layouts: live-in -> its axes.
        result: the axes of what the subgraph computes.
        axes: the operator's axes.
        value: None where the subgraph sums scores alone (a denominator).
        factors: live-ins [B, T, H] that multiply a token's key (or value), "as it is" or as its "exp".
        decay: the live-in of the decay, with its transform; `rate` a factor on the log decay; `shifted`
            where a token's decay acts after it was read.
        rates: a live-in of rates per head and channel of the key, of which a token's log decay of a head is a multiple
            (Mamba's dt A); their sign does not matter.
        stepped: what is written is multiplied with the live-in of the decay as well (Mamba's dt x).
        assumed: the decay is a parameter taken as it is, which must lie in (0, 1].
        constant: the log decay of each head where it is a number of the code.
        complement: what is written is multiplied with one minus the decay (a step from the state towards it).
        step: the beta of a delta rule where it is a number of the code.
        post: live-ins that the output is multiplied with ("times"), divided by ("over"), or that are added ("plus");
            "times exp" and "over exp" for their exponentials.
        first: the state that the sum starts from, which the model has learned; `first_scale` a factor on it.
        skip: where the output has the token's own value once more (the scores have a number on their diagonal): what
            that is multiplied with, and with `skip_scale`; None where it has not.
        normaliser: (form, epsilon) where the output is divided by the same operator on ones.
        scale: factor on the query.
    """

    layouts: Mapping[LiveIn, Axes]
    result: Axes
    axes: MixerAxes
    query: LiveIn
    key: LiveIn
    value: LiveIn | None
    factors: tuple[tuple[LiveIn, str], ...] = ()
    decay: LiveIn | None = None
    transform: Transform | None = None
    rate: float = 1.0
    shifted: bool = False
    rates: LiveIn | None = None
    stepped: bool = False
    assumed: bool = False
    constant: tuple[float, ...] | None = None
    complement: bool = False
    beta: LiveIn | None = None
    step: float | None = None
    post: tuple[tuple[LiveIn, str], ...] = ()
    first: LiveIn | None = None
    first_scale: float = 1.0
    skip: tuple[LiveIn, ...] | None = None
    skip_scale: float = 1.0
    normaliser: tuple[str, float] | None = None
    scale: float = 1.0

    @property
    def family(self) -> tuple[Decay, Correction]:
        """The cell of the table of families."""
        correction: Correction = "none" if self.step is None and self.beta is None else "delta"
        if self.decay is None:
            return ("none" if self.constant is None else "scalar"), correction
        keyed = self.rates is not None or not dims_of(self.layouts[self.decay]).isdisjoint(self.axes.key)
        return ("channel" if keyed else "scalar"), correction

    @property
    def operands(self) -> list[LiveIn]:
        """Every live-in that is a part of the operator's operands."""
        found = [self.query, self.key, self.value, *(s for s, _ in self.factors), self.decay, self.rates, self.beta]
        return [s for s in dict.fromkeys(found) if s is not None]

    def scaled(self, scale: float) -> Hypothesis:
        """The same with another scale."""
        return replace(self, scale=scale)

    def mixer(self, values: Mapping[LiveIn, Any], size: Size, precision: torch.dtype = torch.float32) -> Mixer:
        """The operands in the operator's layout, from tensors or proxies; decays that are numbers in `precision`."""
        a = self.axes
        put = lambda live_in, *groups: arrange(values[live_in], self.layouts[live_in], groups, size)  # noqa: E731
        key = put(self.key, a.batch, a.time, a.groups, a.key)
        if self.value is not None:
            value = put(self.value, a.batch, a.time, a.heads, a.value)
        else:
            ones = torch.ones_like(key[..., :1])
            value = arrange(ones, (a.batch, a.time, a.groups, ()), (a.batch, a.time, a.heads, ()), size)
        if self.normaliser is not None:
            value = torch.cat([value, torch.ones_like(value[..., :1])], dim=-1)
        for factor, form in self.factors:
            factors = put(factor, a.batch, a.time, a.heads, ())
            value = value * (torch.exp(factors) if form == "exp" else factors)
        if self.stepped and self.decay is not None:
            value = value * put(self.decay, a.batch, a.time, a.heads, ())
        decay, correction = self.family
        log_decay = self._log_decay(values, size, value, precision)
        if self.complement:
            written = -torch.expm1(log_decay)
            key, value = (key * written, value) if decay == "channel" else (key, value * written[..., None])
        return Mixer(
            decay=decay,
            correction=correction,
            query=put(self.query, a.batch, a.time, a.groups, a.key),
            key=key,
            value=value,
            log_decay=log_decay,
            decay_rate=None if self.rates is None else torch.abs(put(self.rates, a.heads, a.key)),
            beta=self._beta(put) if self.step is None else torch.full_like(value[..., 0], self.step),
            initial_state=self._first(values, size),
            scale=self.scale,
        )

    def _first(self, values: Mapping[LiveIn, Any], size: Size) -> Any:
        """The state at the start, [B, H, K, V]."""
        if self.first is None:
            return None
        if self.value is None or self.normaliser is not None:
            raise CannotArrange
        a = self.axes
        state = arrange(values[self.first], self.layouts[self.first], (a.batch, a.heads, a.key, a.value), size)
        return state if self.first_scale == 1.0 else state * self.first_scale

    def _beta(self, put: Callable[..., Any]) -> Any:
        a = self.axes
        return None if self.beta is None else put(self.beta, a.batch, a.time, a.heads)

    def _log_decay(self, values: Mapping[LiveIn, Any], size: Size, like: Any, precision: torch.dtype) -> Any:
        a = self.axes
        if self.decay is None:
            if self.constant is None:
                return None
            numbers = like.new_tensor(list(self.constant), dtype=torch.float64)
            return numbers.to(precision)
        assert self.transform is not None
        z = self.transform.log_decay(values[self.decay])
        z = z if self.rate == 1.0 else z * self.rate
        keyed = [a.key] if self.family[0] == "channel" and self.rates is None else []
        if not keyed and dims_of(self.layouts[self.decay]).isdisjoint((*a.batch, *a.time)):
            return arrange(z, self.layouts[self.decay], (a.heads,), size)
        z = arrange(z, self.layouts[self.decay], (a.batch, a.time, a.heads, *keyed), size)
        if self.shifted:
            z = torch.cat([torch.zeros_like(z[:, :1]), z[:, :-1]], dim=1)
        return z

    def finish(self, output: Any, values: Mapping[LiveIn, Any], size: Size) -> Any:
        """What the subgraph computes, from the operator's output [B, T, H, V]."""
        a = self.axes
        if self.normaliser is not None:
            form, epsilon = self.normaliser
            features = lambda: self._query_sum(values, size)  # noqa: E731
            output = output[..., :-1] / NORMALISERS[form](output[..., -1:], epsilon, features)
        if self.skip is not None:
            output = output + self._skipped(values, size)
        output = arrange(output, (a.batch, a.time, a.heads, a.value), self.result, size)
        for live_in, how in self.post:
            other = arrange(values[live_in], self.layouts[live_in], self.result, size, broadcast=True)
            output = POSTS[how](output, other)
        return output

    def _skipped(self, values: Mapping[LiveIn, Any], size: Size) -> Any:
        """What the diagonal of the scores adds, [B, T, H, V]."""
        if self.value is None or self.skip is None:
            raise CannotArrange
        a = self.axes
        whole = (a.batch, a.time, a.heads, a.value)
        added = arrange(values[self.value], self.layouts[self.value], whole, size)
        for live_in in self.skip:
            added = added * arrange(values[live_in], self.layouts[live_in], whole, size)
        return added if self.skip_scale == 1.0 else added * self.skip_scale

    def _query_sum(self, values: Mapping[LiveIn, Any], size: Size) -> Any:
        """The sum of the query's features, [B, T, H, 1]."""
        a = self.axes
        query = arrange(values[self.query], self.layouts[self.query], (a.batch, a.time, a.groups, a.key), size)
        return arrange(
            query.sum(-1, keepdim=True), (a.batch, a.time, a.groups, ()), (a.batch, a.time, a.heads, ()), size
        )
