"""Layers made up at random: a family, a kind of spelling, and how the operands lie in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from llcompile.patterns.families import FAMILIES, Correction, Decay
from tests.spellings.registry import WIDTH, Mixer, Operands

Kind = Literal["pairs", "cumsum", "loop"]


# Changes of one place that work for each kind and family.
MISSES: dict[Kind, tuple[str, ...]] = {
    "pairs": ("relu", "cubed", "one ahead", "window"),
    "cumsum": ("backwards", "tanh", "window"),
    "loop": ("tanh", "relu"),
}


@dataclass(frozen=True)
class Recipe:
    """What a layer is made by.

    `outer` is the order of the input's axes (b may be absent); `inner` that of an operand's (b absent with it; h
    absent only with one head); `merged` flattens b and h where they are neighbours; `state` is "kv" or "vk";
    `scaled` says what the scale is multiplied to; `fused` makes all operands by one projection. `miss` is a change that
    makes it something else, one of `MISSES`.
    """

    decay: Decay
    correction: Correction
    kind: Kind
    outer: str
    inner: str
    merged: bool
    state: str
    scaled: Literal["q", "k", "o"]
    fused: bool
    heads: int
    key_dim: int
    value_dim: int
    length: int
    miss: str = ""


@st.composite
def recipes(draw: st.DrawFn, misses: bool = False) -> Recipe:
    """Any recipe whose parts fit together; with `misses` one that makes something else."""
    decay, correction = draw(st.sampled_from(sorted(f for f in FAMILIES if f[1] != "erase")))
    kinds: tuple[Kind, ...] = ("pairs", "loop") if correction == "delta" else ("pairs", "cumsum", "loop")
    batched = draw(st.booleans())
    heads = draw(st.integers(1, 3))
    axes = ("b" if batched else "") + ("h" if heads > 1 or draw(st.booleans()) else "") + "tf"
    kind: Kind = draw(st.sampled_from(kinds))
    return Recipe(
        decay=decay,
        correction=correction,
        kind=kind,
        outer="".join(draw(st.permutations("btd" if batched else "td"))),
        inner="".join(draw(st.permutations(axes))),
        merged=draw(st.booleans()),
        state=draw(st.sampled_from(("kv", "vk"))),
        scaled=draw(st.sampled_from(("q", "o") if correction == "delta" else ("q", "k", "o"))),
        fused=draw(st.booleans()),
        heads=heads,
        key_dim=draw(st.integers(3, 7)),
        value_dim=draw(st.integers(3, 7)),
        length=draw(st.integers(7, 10 if kind == "loop" else 19)),
        miss=draw(st.sampled_from(MISSES[kind])) if misses else "",
    )


class Composed(Mixer):
    """The layer of a recipe."""

    scale = 0.4

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = r = recipe
        self.miss = r.miss
        self.layout = r.outer
        sizes = {"q": r.key_dim, "k": r.key_dim, "v": r.value_dim}
        sizes |= {"g": 1 if r.decay == "scalar" else r.key_dim} if r.decay != "none" else {}
        sizes |= {"beta": 1} if r.correction == "delta" else {}
        self.sizes = sizes
        if r.fused:
            self.proj = nn.Linear(WIDTH, r.heads * sum(sizes.values()))
        else:
            self.projs = nn.ModuleDict({name: nn.Linear(WIDTH, r.heads * size) for name, size in sizes.items()})
        self.out = nn.Linear(r.heads * r.value_dim, WIDTH)

    def projected(self, x: Tensor) -> dict[str, Tensor]:
        """Each operand as [B, T, H, size]."""
        r = self.recipe
        x = x.permute([r.outer.index(axis) for axis in "btd" if axis in r.outer])
        x = x if "b" in r.outer else x[None]
        if r.fused:
            parts = self.proj(x).unflatten(-1, (r.heads, -1)).split(list(self.sizes.values()), -1)
        else:
            parts = tuple(f(x).unflatten(-1, (r.heads, -1)) for f in self.projs.values())
        named = dict(zip(self.sizes, parts, strict=True))
        if "g" in named:
            named["g"] = F.logsigmoid(named["g"] + 1) / 2
        if "beta" in named:
            named |= {"beta": named["beta"].sigmoid(), "k": F.normalize(named["k"], dim=-1)}
        return named

    def operands(self, x: Tensor) -> Operands:
        named = self.projected(x)
        given: Operands = {name: named[name] for name in "qkv"} | {"scale": self.scale}
        if "g" in named:
            given["log_decay"] = named["g"] if self.recipe.decay == "channel" else named["g"][..., 0]
        if "beta" in named:
            given["beta"] = named["beta"][..., 0]
        return given

    def arranged(self, x: Tensor) -> Tensor:
        """[B, T, H, size] -> the recipe's layout, merged where it says so."""
        r = self.recipe
        for axis, dim in (("h", 2), ("b", 0)):
            if axis not in r.inner:
                x = x.squeeze(dim)
        present = [axis for axis in "bthf" if axis in r.inner]
        x = x.permute([present.index(axis) for axis in r.inner])
        return x.flatten(self.pair, self.pair + 1) if self.pair >= 0 else x

    @property
    def pair(self) -> int:
        """Where two neighbours b and h are merged into n; -1 if they are not."""
        return max(self.recipe.inner.find("bh"), self.recipe.inner.find("hb")) if self.recipe.merged else -1

    @property
    def axes(self) -> str:
        """The operands' axes after merging."""
        return self.recipe.inner.replace("bh", "n").replace("hb", "n") if self.pair >= 0 else self.recipe.inner

    def forward(self, x: Tensor) -> Tensor:
        r = self.recipe
        named = {name: self.arranged(y) for name, y in self.projected(x).items()}
        if r.scaled in ("q", "k"):
            named[r.scaled] = named[r.scaled] * self.scale
        o = {"pairs": self.pairs, "cumsum": self.cumsum, "loop": self.loop}[r.kind](named)
        if r.scaled == "o":
            o = o * self.scale
        if self.pair >= 0:
            pair = r.inner[self.pair : self.pair + 2]
            batch = x.shape[r.outer.index("b")]
            o = o.unflatten(self.pair, (batch, r.heads) if pair == "bh" else (r.heads, batch))
        kept = [axis for axis in "bthf" if axis in r.inner]
        o = o.permute([r.inner.index(axis) for axis in kept])
        o = o.flatten(-2) if "h" in r.inner else o
        o = self.out(o)
        now = [axis for axis in "btd" if axis in r.outer]
        return x + o.permute([now.index(axis) for axis in r.outer])

    def heads_last(self, mixed: Tensor) -> Tensor:
        return mixed if "b" in self.recipe.outer else mixed[None]

    def pairs(self, named: dict[str, Tensor]) -> Tensor:
        """Time by time: scores, decays and, for the delta rule, a triangular solve."""
        q = self.axes.replace("f", "k")
        lead = q.replace("t", "").replace("k", "")
        s, v = q.replace("t", "s"), q.replace("t", "s").replace("k", "v")
        t = named["q"].shape[q.index("t")]
        mask = torch.ones(t, t, dtype=torch.bool).tril(1 if self.miss == "one ahead" else 0)
        if self.miss == "window":
            mask = mask.triu(-4)
        if self.recipe.decay == "channel":
            c = named["g"].cumsum(q.index("t")).permute([q.index(a) for a in lead + "tk"])
            rel = (c.unsqueeze(-2) - c.unsqueeze(-3)).masked_fill(~mask[..., None], -torch.inf).exp()
            scores = torch.einsum(f"{q},{s},{lead}tsk->{lead}ts", named["q"], named["k"], rel)
            gram = torch.einsum(f"{q},{s},{lead}tsk->{lead}ts", named["k"], named["k"], rel)
        else:
            scores = torch.einsum(f"{q},{s}->{lead}ts", named["q"], named["k"])
            gram = torch.einsum(f"{q},{s}->{lead}ts", named["k"], named["k"])
            rel = mask.to(scores)
            if "g" in named:
                c = named["g"].squeeze(q.index("k"))
                c = c.permute([q.replace("k", "").index(a) for a in lead + "t"]).cumsum(-1)
                rel = (c.unsqueeze(-1) - c.unsqueeze(-2)).masked_fill(~mask, -torch.inf).exp()
            scores, gram = scores * rel, gram * rel
        if self.miss in ("relu", "cubed"):
            scores = scores.relu() if self.miss == "relu" else scores**3
        values = named["v"]
        if "beta" in named:
            beta = named["beta"].permute([q.index(a) for a in lead + "tk"])
            rows = values.permute([q.index(a) for a in lead + "tk"]) * beta
            system = torch.eye(t).to(values) + (beta * gram).tril(-1)
            values = torch.linalg.solve_triangular(system, rows, upper=False)
            v = f"{lead}sv"
        return torch.einsum(f"{lead}ts,{v}->{q.replace('k', 'v')}", scores, values)

    def cumsum(self, named: dict[str, Tensor]) -> Tensor:
        """A state for each token, by cumulative sums."""
        q = self.axes.replace("f", "k")
        v, lead = q.replace("k", "v"), q.replace("k", "")
        state = f"{lead}{self.recipe.state}"
        k = named["k"]
        if "g" in named:
            c = named["g"].cumsum(q.index("t"))
            k, query = k * (-c).exp(), named["q"] * c.exp()
        else:
            query = named["q"]
        time = lead.index("t")
        states = torch.einsum(f"{q},{v}->{state}", k, named["v"])
        states = states.flip(time).cumsum(time).flip(time) if self.miss == "backwards" else states.cumsum(time)
        if self.miss == "tanh":
            states = states.tanh()
        if self.miss == "window":
            end = states.shape[time]
            old = states.narrow(time, 0, end - 4)
            states = states - torch.cat([torch.zeros_like(states.narrow(time, 0, 4)), old], time)
        return torch.einsum(f"{q},{state}->{v}", query, states)

    def loop(self, named: dict[str, Tensor]) -> Tensor:
        """One token after another."""
        time = self.axes.index("t")
        q = self.axes.replace("t", "").replace("f", "k")
        v, state = q.replace("k", "v"), q.replace("k", "") + self.recipe.state
        S: Tensor | None = None
        outs = []
        for i in range(named["q"].shape[time]):
            now = {name: y.select(time, i) for name, y in named.items()}
            if S is None:
                S = 0 * torch.einsum(f"{q},{v}->{state}", now["k"], now["v"])
            if "g" in now:
                decay = now["g"].exp()
                decay = decay.expand_as(now["k"]) if self.recipe.decay == "scalar" else decay
                S = torch.einsum(f"{state},{q}->{state}", S, decay)
            value = now["v"]
            if self.miss == "relu":
                S = S.relu()
            if "beta" in now:
                value = now["beta"] * (value - torch.einsum(f"{state},{q}->{v}", S, now["k"]))
            S = S + torch.einsum(f"{q},{v}->{state}", now["k"], value)
            if self.miss == "tanh":
                S = S.tanh()
            outs.append(torch.einsum(f"{state},{q}->{v}", S, now["q"]))
        return torch.stack(outs, time)
