"""Writes the program of a recipe: a text that stands by itself."""

from __future__ import annotations

import inspect
import random
import textwrap
from dataclasses import replace
from pathlib import Path

from tests.fuzz import check
from tests.fuzz.recipes import (
    AROUND,
    DECAYS,
    FEATURES,
    GROUPS,
    HOOKS,
    IN_PLACE,
    LAYOUTS,
    MASKS,
    MODELS,
    MUTATIONS,
    RUNNERS,
    Layout,
    Recipe,
    draw,
)

_PROGRAM = '''"""{title}"""

{imports}

B, H, G, K, V, D = 2, 2, {groups}, 4, 6, 12
TIME = {time}  # the axis of time while it is mixed
LENGTHS = {lengths}  # that of conversion, and two others


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(D, G * K), nn.Linear(D, G * K), nn.Linear(D, H * V)
        self.out, self.drop = nn.Linear(H * V, D), nn.Dropout(0.0)
{init}

    def forward(self, x):
        b, t, _ = x.shape
{forward}
        return self.drop(self.out(o.reshape(b, t, H * V))) / 8


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range({layers}))

    def forward(self, x):
{model}


def make():
    model = Model()
{hook}
    return model


def runner(model, compile):
{runner}


{check}

if __name__ == "__main__":
    main(make, runner, LENGTHS, D)
'''


def program(recipe: Recipe) -> str:
    """The text of a recipe's program; its `main(make, runner, LENGTHS, D)` checks it.

    Raises:
        LookupError: nothing in it can be mutated in that way.
    """
    layout = LAYOUTS[recipe.layout]
    init = [DECAYS[recipe.decay][0], AROUND[recipe.around][0]]
    on_input, on_operands, on_output = IN_PLACE[recipe.in_place]
    to = [f"{name} = {layout.to.format(name)}" for name in ("q", "k", "v")]
    if recipe.decay != "none":
        to.append(f"g = {layout.to.format('g')}")
    lines = [
        on_input,
        "q, k, v = self.q(x).view(b, t, G, K), self.k(x).view(b, t, G, K), self.v(x).view(b, t, H, V)",
        FEATURES[recipe.feature],
        "" if recipe.spelling == "delta loop" and recipe.group == "repeat" else GROUPS[recipe.group],
        DECAYS[recipe.decay][1],
        on_operands,
        *to,
        "# mixing",
        _mixing(recipe, layout),
        "# mixed",
        *(f"{name} = {layout.back.format(name)}" for name in ("o", "k", "v")),
        on_output,
        AROUND[recipe.around][1],
    ]
    text = _PROGRAM.format(
        title=textwrap.fill(str(recipe), 110),
        imports=_IMPORTS,
        groups=2 if recipe.spelling == "delta loop" and recipe.group == "repeat" else 1,
        time=layout.time,
        lengths=recipe.lengths,
        init=_indented(8, *init),
        forward=_indented(8, *lines),
        layers=recipe.layers,
        model=_indented(8, MODELS[recipe.model]),
        hook=_indented(4, HOOKS[recipe.hook]),
        runner=_indented(4, RUNNERS[recipe.runner]),
        check=_CHECK,
    )
    return _mutated(text, recipe.mutation)


def drawn(seed: str, mutate: bool) -> tuple[Recipe, str]:
    """A recipe and its program; mutated ones are mutated in a way that the recipe admits."""
    recipe = draw(seed)
    for mutation in random.Random(seed).sample(list(MUTATIONS), len(MUTATIONS)) if mutate else [""]:
        try:
            return (mutated := replace(recipe, mutation=mutation)), program(mutated)
        except LookupError:
            continue
    raise AssertionError("the mutations at '# mixing' fit each program")


def _mutated(text: str, mutation: str) -> str:
    if not mutation:
        return text
    changes = [change for change in MUTATIONS[mutation] if change[0] in text]
    if not changes:
        raise LookupError(mutation)
    for old, new in changes:
        indent = " " * (len(text[: text.index(old)]) - text[: text.index(old)].rindex("\n") - 1)
        text = text.replace(old, new.replace("\n", "\n" + indent))
    return text


def _mixing(recipe: Recipe, layout: Layout) -> str:
    lead, axes = layout.lead, layout.axes
    size = "b * H" if lead == "n" else "b, H"
    names = {"q": f"{axes}k", "s": f"{axes}k".replace("t", "s"), "v": f"{axes}v", "sv": f"{axes}v".replace("t", "s")}
    state = f"{lead}kv"
    scalar, channel = recipe.decay not in ("none", "channel"), recipe.decay == "channel"
    # The decay to a state [.., K, V], and to q or k [.., K].
    on_state = "[..., None]" if channel else "[..., None, None]"
    on_key = "" if channel else "[..., None]"
    now = {name: f"{name}.select(TIME, i)" for name in "qkvg"}
    if recipe.spelling == "quadratic":
        # [lead, t] or [lead, t, K]
        front = f'torch.einsum("{axes}{"k" * channel}->{lead}t{"k" * channel}", g).cumsum({len(lead)})'
        scores = f'scores = torch.einsum("{names["q"]},{names["s"]}->{lead}ts", q, k)'
        decayed = []
        if scalar or channel:
            n = len(lead)
            decayed = [f"c = {front}", f"far = (c.unsqueeze({n + 1}) - c.unsqueeze({n}))"]
            decayed += [f"far = far.masked_fill((i[:, None] < i){'[..., None]' * channel}, -torch.inf).exp()"]
        if scalar:
            decayed.append("scores = scores * far")
        if channel:
            scores = f'scores = torch.einsum("{names["q"]},{names["s"]},{lead}tsk->{lead}ts", q, k, far)'
            return "\n".join([_COUNT, *decayed, scores, *_end(recipe, layout)])
        return "\n".join([_COUNT, scores, *decayed, *_end(recipe, layout)])
    if recipe.spelling == "cumulative":
        keys, queries = ("k * (-c).exp()" + "", "q * c.exp()") if scalar or channel else ("k", "q")
        c = [f"c = g.cumsum(TIME){on_key}"] if scalar or channel else []
        states = f'states = torch.einsum("{names["q"]},{names["v"]}->{axes}kv", {keys}, v).cumsum(TIME)  # of states'
        read = f'o = torch.einsum("{names["q"]},{axes}kv->{names["v"]}", {queries}, states)'
        return "\n".join([*c, states, "# states", read])
    if recipe.spelling == "doubling":
        return "\n".join(
            [
                f'states, far = torch.einsum("{names["q"]},{names["v"]}->{axes}kv", k, v), 1',
                "while far < t:",
                "    old = states.narrow(TIME, 0, t - far)",
                "    states = states + torch.cat([torch.zeros_like(states.narrow(TIME, 0, far)), old], TIME)",
                "    far *= 2",
                "# states",
                f'o = torch.einsum("{names["q"]},{axes}kv->{names["v"]}", q, states)',
            ]
        )
    if recipe.spelling == "chunk loop":
        q, k = ("q.narrow(TIME, start, size)", "k.narrow(TIME, start, size)")
        lines = [
            f"state, outs = x.new_zeros({size}, K, V), []",
            "for start in range(0, t, 4):",
            "    size = min(4, t - start)",
            f"    qc, kc, vc = {q}, {k}, v.narrow(TIME, start, size)",
        ]
        if scalar or channel:
            lines += [
                f"    c = g.narrow(TIME, start, size).cumsum(TIME){on_key}",
                "    qc, kc = qc * c.exp(), kc * (-c).exp()",
            ]
        total = f"c.select(TIME, size - 1).exp(){'[..., None]'}"
        lines += [
            f'    scores = torch.einsum("{names["q"]},{names["s"]}->{lead}ts", qc, kc).tril()',
            f'    o = torch.einsum("{lead}ts,{names["sv"]}->{names["v"]}", scores, vc)',
            f'    outs.append(o + torch.einsum("{names["q"]},{state}->{names["v"]}", qc, state))',
            f'    state = state + torch.einsum("{names["q"]},{names["v"]}->{state}", kc, vc)',
            *([f"    state = {total} * state"] if scalar or channel else []),
            "o = torch.cat(outs, TIME)",
        ]
        return "\n".join(lines)
    k, v = f"{lead}k", f"{lead}v"
    steps = [f"state = state * {now['g']}.exp(){on_state}"] if scalar or channel else []
    if recipe.spelling == "delta loop":
        steps += [f'old = torch.einsum("{k},{state}->{v}", {now["k"]}, state)', f"new = 0.5 * ({now['v']} - old)"]
    else:
        steps += [f"new = {now['v']}"]
    steps += [f'state = state + torch.einsum("{k},{v}->{state}", {now["k"]}, new)']
    out = f'torch.einsum("{k},{state}->{v}", {now["q"]}, state)'
    first = f"state, outs = x.new_zeros({size}, K, V), []"
    if recipe.spelling == "step function":
        body = ["def step(state, i):", *(f"    {s}" for s in steps), f"    return state, {out}", "", first]
        loop = ["for i in range(t):", "    state, out = step(state, i)", "    outs.append(out)"]
        return "\n".join([*body, *loop, "o = torch.stack(outs, TIME)"])
    return "\n".join(
        [
            first,
            "for i in range(t):",
            *(f"    {s}" for s in steps),
            f"    outs.append({out})",
            "o = torch.stack(outs, TIME)",
        ]
    )


_COUNT = "i = torch.arange(t)"


def _end(recipe: Recipe, layout: Layout) -> list[str]:
    axes, lead = layout.axes, layout.lead
    sv = f"{axes}v".replace("t", "s")
    return [MASKS[recipe.mask], "# scores", f'o = torch.einsum("{lead}ts,{sv}->{axes}v", scores, v)']


def _indented(by: int, *pieces: str) -> str:
    return textwrap.indent("\n".join(piece for piece in pieces if piece), " " * by)


_SOURCE = Path(inspect.getfile(check)).read_text()
# check.py without its docstring and its imports, which go to the top.
_IMPORTS, _CHECK = (part.strip() for part in _SOURCE.split("\n\n\n", 1))
_IMPORTS = _IMPORTS.split('"""')[-1].replace("from __future__ import annotations\n", "").strip()
