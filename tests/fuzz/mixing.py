"""How the mixing of a program is written: a function for each spelling, from q, k, v and g to o in the same layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.fuzz.recipes import LAYOUTS, MASKS, Layout, Recipe

Lines = list[str]


@dataclass(frozen=True)
class Terms:
    """What the spellings have in common: the letters of einsum, and where the decay goes.

    Args:
        layout: how the operands lie.
        decay: "none", "scalar" (g has the operands' axes but the last) or "channel" (g lies as k does).
        mask: the statement that makes scores causal.
    """

    layout: Layout
    decay: str
    mask: str

    @property
    def lead(self) -> str:
        """The axes of an operand at one position, without its features."""
        return self.layout.lead

    @property
    def now(self) -> str:
        """The axes of an operand, without its features."""
        return self.layout.axes

    @property
    def past(self) -> str:
        """The same, where time is the earlier one of two."""
        return self.now.replace("t", "s")

    @property
    def scores(self) -> str:
        """The axes of scores."""
        return f"{self.lead}ts"

    @property
    def state(self) -> str:
        """The axes of a state."""
        return f"{self.lead}kv"

    @property
    def empty(self) -> str:
        """A state of zeros."""
        return f"x.new_zeros({'b * H' if self.lead == 'n' else 'b, H'}, K, V)"

    @property
    def decays(self) -> bool:
        """Whether there is a decay."""
        return self.decay != "none"

    @property
    def on_key(self) -> str:
        """What makes a decay as wide as q and k."""
        return "" if self.decay == "channel" else "[..., None]"

    @property
    def on_state(self) -> str:
        """What makes a decay of one position as wide as a state."""
        return f"{self.on_key}[..., None]" if self.decay == "channel" else "[..., None, None]"

    def if_decaying(self, *lines: str) -> Lines:
        """These lines, if there is a decay."""
        return list(lines) if self.decays else []


def _quadratic(t: Terms) -> Lines:
    return [
        "i = torch.arange(t)",
        *({"none": _scores, "scalar": _decayed_scores, "channel": _channel_scores}[t.decay](t)),
        t.mask,
        "# scores",
        f'o = torch.einsum("{t.scores},{t.past}v->{t.now}v", scores, v)',
    ]


def _scores(t: Terms) -> Lines:
    return [f'scores = torch.einsum("{t.now}k,{t.past}k->{t.scores}", q, k)']


def _decayed_scores(t: Terms) -> Lines:
    return [*_scores(t), *_far(t, ""), "scores = scores * far"]


def _channel_scores(t: Terms) -> Lines:
    scores = f'scores = torch.einsum("{t.now}k,{t.past}k,{t.scores}k->{t.scores}", q, k, far)'
    return [*_far(t, "k"), scores]


def _far(t: Terms, features: str) -> Lines:
    """What is left of a token at a later one."""
    n, masked = len(t.lead), "[..., None]" if features else ""
    return [
        f'c = torch.einsum("{t.now}{features}->{t.lead}t{features}", g).cumsum({n})',
        f"far = (c.unsqueeze({n + 1}) - c.unsqueeze({n}))",
        f"far = far.masked_fill((i[:, None] < i){masked}, -torch.inf).exp()",
    ]


def _cumulative(t: Terms) -> Lines:
    queries, keys = ("q * c.exp()", "k * (-c).exp()") if t.decays else ("q", "k")
    return [
        *t.if_decaying(f"c = g.cumsum(TIME){t.on_key}"),
        f'states = torch.einsum("{t.now}k,{t.now}v->{t.now}kv", {keys}, v).cumsum(TIME)  # of states',
        "# states",
        f'o = torch.einsum("{t.now}k,{t.now}kv->{t.now}v", {queries}, states)',
    ]


def _doubling(t: Terms) -> Lines:
    return [
        f'states, far = torch.einsum("{t.now}k,{t.now}v->{t.now}kv", k, v), 1',
        "while far < t:",
        "    old = states.narrow(TIME, 0, t - far)",
        "    states = states + torch.cat([torch.zeros_like(states.narrow(TIME, 0, far)), old], TIME)",
        "    far *= 2",
        "# states",
        f'o = torch.einsum("{t.now}k,{t.now}kv->{t.now}v", q, states)',
    ]


def _chunk_loop(t: Terms) -> Lines:
    return [
        f"state, outs = {t.empty}, []",
        "for start in range(0, t, 4):",
        "    size = min(4, t - start)",
        "    qc, kc, vc = (y.narrow(TIME, start, size) for y in (q, k, v))",
        *t.if_decaying(
            f"    c = g.narrow(TIME, start, size).cumsum(TIME){t.on_key}",
            "    qc, kc = qc * c.exp(), kc * (-c).exp()",
        ),
        f'    scores = torch.einsum("{t.now}k,{t.past}k->{t.scores}", qc, kc).tril()',
        f'    o = torch.einsum("{t.scores},{t.past}v->{t.now}v", scores, vc)',
        f'    outs.append(o + torch.einsum("{t.now}k,{t.state}->{t.now}v", qc, state))',
        f'    state = state + torch.einsum("{t.now}k,{t.now}v->{t.state}", kc, vc)',
        *t.if_decaying("    state = c.select(TIME, size - 1).exp()[..., None] * state"),
        "o = torch.cat(outs, TIME)",
    ]


def _token_loop(t: Terms) -> Lines:
    return _steps(t, "new = v.select(TIME, i)")


def _delta_loop(t: Terms) -> Lines:
    old = f'old = torch.einsum("{t.lead}k,{t.state}->{t.lead}v", k.select(TIME, i), state)'
    return _steps(t, old, "new = 0.5 * (v.select(TIME, i) - old)")


def _steps(t: Terms, *new: str) -> Lines:
    step = [*_step(t, *new), f"outs.append({_read(t)})"]
    return [
        f"state, outs = {t.empty}, []",
        "for i in range(t):",
        *(f"    {line}" for line in step),
        "o = torch.stack(outs, TIME)",
    ]


def _step_function(t: Terms) -> Lines:
    return [
        "def step(state, i):",
        *(f"    {line}" for line in _step(t, "new = v.select(TIME, i)")),
        f"    return state, {_read(t)}",
        "",
        f"state, outs = {t.empty}, []",
        "for i in range(t):",
        "    state, out = step(state, i)",
        "    outs.append(out)",
        "o = torch.stack(outs, TIME)",
    ]


def _step(t: Terms, *new: str) -> Lines:
    """A token's part in the state; `new` says what is written."""
    return [
        *t.if_decaying(f"state = state * g.select(TIME, i).exp(){t.on_state}"),
        *new,
        f'state = state + torch.einsum("{t.lead}k,{t.lead}v->{t.state}", k.select(TIME, i), new)',
    ]


def _read(t: Terms) -> str:
    return f'torch.einsum("{t.lead}k,{t.state}->{t.lead}v", q.select(TIME, i), state)'


_SPELLINGS: dict[str, Callable[[Terms], Lines]] = {
    "quadratic": _quadratic,
    "cumulative": _cumulative,
    "chunk loop": _chunk_loop,
    "doubling": _doubling,
    "token loop": _token_loop,
    "step function": _step_function,
    "delta loop": _delta_loop,
}


def mixing(recipe: Recipe) -> Lines:
    """The statements that make o of q, k, v and g."""
    decay = recipe.decay if recipe.decay in ("none", "channel") else "scalar"
    return _SPELLINGS[recipe.spelling](Terms(LAYOUTS[recipe.layout], decay, MASKS[recipe.mask]))
