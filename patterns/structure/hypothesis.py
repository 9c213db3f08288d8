"""Hypothesis: a subgraph of a program understood as a mixer: which live-in is which operand, and on which axes."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Mapping
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
        erase_query, erase_key: where the state is erased along a key of its own, live-ins whose products these are;
            `erase_scale` a factor. With `erase_late`, what is erased is read after the decay. `beta` is then a factor
            of what is erased and of what is written.
        early: the query reads the state before its own token changes it; with `decayed`, but for the decay.
        own: where the state is read early: what the weight of the own token is a product of beside the query (the key,
            a bonus), and with `own_scale`; None where it has none.
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
    erase_query: tuple[LiveIn, ...] = ()
    erase_key: tuple[LiveIn, ...] = ()
    erase_scale: float = 1.0
    erase_late: bool = False
    early: bool = False
    decayed: bool = False
    own: tuple[LiveIn, ...] | None = None
    own_scale: float = 1.0
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
        if self.erase_query:
            correction = "erase"
        if self.decay is None:
            return ("none" if self.constant is None else "scalar"), correction
        keyed = self.rates is not None or not dims_of(self.layouts[self.decay]).isdisjoint(self.axes.key)
        return ("channel" if keyed else "scalar"), correction

    @property
    def operands(self) -> list[LiveIn]:
        """Every live-in that is a part of the operator's operands."""
        factors = (*(s for s, _ in self.factors), *self.erase_query, *self.erase_key)
        found = [self.query, self.key, self.value, *factors, self.decay, self.rates, self.beta]
        return [s for s in dict.fromkeys(found) if s is not None]

    def scaled(self, scale: float) -> Hypothesis:
        """The same with another scale."""
        return replace(self, scale=scale)

    def mixer(self, values: Mapping[LiveIn, Any], size: Size, precision: torch.dtype = torch.float32) -> Mixer:
        """The operands in the operator's layout, from tensors or proxies; decays that are numbers in `precision`."""
        a = self.axes
        put = lambda live_in, *groups: arrange(values[live_in], self.layouts[live_in], groups, size)  # noqa: E731
        groups = a.heads if self._by_head else a.groups
        query, key = (put(live_in, a.batch, a.time, groups, a.key) for live_in in (self.query, self.key))
        value = self._value(values, size)
        if self.normaliser is not None:
            value = torch.cat([value, torch.ones_like(value[..., :1])], dim=-1)
        value = self._with_factors(value, values, size)
        decay, correction = self.family
        log_decay = self._log_decay(values, size, value, precision)
        if self.complement:
            written = -torch.expm1(log_decay)
            key, value = (key * written, value) if decay == "channel" else (key, value * written[..., None])
        if self.decayed and log_decay is not None:
            query = (query * _factor(log_decay, decay)).type_as(query)
        beta = self._beta(put) if self.step is None else torch.full_like(value[..., 0], self.step)
        erase_query, erase_key = self._erase(values, size, groups, query, _factor(log_decay, decay))
        if correction == "erase" and beta is not None:
            value = value * beta.unsqueeze(-1)
        return Mixer(
            decay=decay,
            correction=correction,
            query=query,
            key=key,
            value=value,
            log_decay=log_decay,
            decay_rate=None if self.rates is None else torch.abs(put(self.rates, a.heads, a.key)),
            beta=beta,
            erase_query=erase_query,
            erase_key=erase_key,
            initial_state=self._first(values, size),
            scale=self.scale,
            early=self.early,
        )

    @property
    def _by_head(self) -> bool:
        """Whether something that only heads have becomes a part of queries or of what is erased."""
        erased = (*self.erase_query, *self.erase_key)
        late = [self.decay] if self.decay is not None and (self.erase_late or self.decayed) else []
        constant = self.constant is not None and (self.erase_late or self.decayed)
        held = dims_of(axis for s in (*erased, *late) for axis in self.layouts[s])
        return bool(self.axes.rest) and (constant or not held.isdisjoint(self.axes.rest))

    def _value(self, values: Mapping[LiveIn, Any], size: Size) -> Any:
        """The value, [B, T, H, V]; ones where there is none."""
        a = self.axes
        whole = (a.batch, a.time, a.heads, a.value)
        if self.value is not None:
            return arrange(values[self.value], self.layouts[self.value], whole, size)
        key = arrange(values[self.key], self.layouts[self.key], (a.batch, a.time, a.groups, a.key), size)
        ones = torch.ones_like(key[..., :1])
        return arrange(ones, (a.batch, a.time, a.groups, ()), (a.batch, a.time, a.heads, ()), size)

    def _with_factors(self, value: Any, values: Mapping[LiveIn, Any], size: Size) -> Any:
        a = self.axes
        for factor, form in self.factors:
            factors = arrange(values[factor], self.layouts[factor], (a.batch, a.time, a.heads, ()), size)
            value = value * (torch.exp(factors) if form == "exp" else factors)
        if self.stepped and self.decay is not None:
            value = value * arrange(values[self.decay], self.layouts[self.decay], (a.batch, a.time, a.heads, ()), size)
        return value

    def _erase(self, values: Mapping[LiveIn, Any], size: Size, heads: Axis, query: Any, decay: Any) -> tuple[Any, Any]:
        """What is read to be erased, and where it is taken away: [B, T, G, K] both, or nothing."""
        if not self.erase_query:
            return None, None
        read, taken = (self._product(s, values, size, heads) for s in (self.erase_query, self.erase_key))
        if self.erase_late and decay is not None:
            read = read * decay
        taken = taken if self.erase_scale == 1.0 else taken * self.erase_scale
        return read.type_as(query), taken.type_as(query)

    def _product(self, live_ins: Iterable[LiveIn], values: Mapping[LiveIn, Any], size: Size, heads: Axis) -> Any:
        """The product of live-ins, [B, T, heads, K]."""
        a = self.axes
        groups = (a.batch, a.time, heads, a.key)
        factors = (arrange(values[s], self.layouts[s], groups, size) for s in live_ins)
        return functools.reduce(operator.mul, factors)

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
        if self.normaliser is not None:
            form, epsilon = self.normaliser
            features = lambda: self._query_sum(values, size)  # noqa: E731
            output = output[..., :-1] / NORMALISERS[form](output[..., -1:], epsilon, features)
        if self.skip is not None:
            output = output + self._skipped(values, size)
        if self.own is not None:
            output = output + self.own_term(values, size) * self.own_scale
        output = self.laid_out(output, size)
        for live_in, how in self.post:
            other = arrange(values[live_in], self.layouts[live_in], self.result, size, broadcast=True)
            output = POSTS[how](output, other)
        return output

    def laid_out(self, output: Any, size: Size) -> Any:
        """An output [B, T, H, V] as the subgraph has it."""
        a = self.axes
        return arrange(output, (a.batch, a.time, a.heads, a.value), self.result, size)

    def own_term(self, values: Mapping[LiveIn, Any], size: Size) -> Any:
        """What a token adds to its own output where the state is read early, [B, T, H, V]."""
        assert self.own is not None
        weight = self._product((self.query, *self.own), values, size, self.axes.heads).sum(-1, keepdim=True)
        return weight * self._with_factors(self._value(values, size), values, size)

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


def _factor(log_decay: Any, decay: Decay) -> Any:
    """The decay as a factor of [B, T, H, K]; None where there is none."""
    if log_decay is None:
        return None
    return log_decay.exp() if decay == "channel" else log_decay.exp().unsqueeze(-1)
