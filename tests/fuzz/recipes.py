"""What a program is put together from: tables of pieces of Python, and a recipe that names one of each.

The pieces speak of sizes B, T (`b`, `t`), H, G, K, V and D; of q, k, v and g, first as [B, T, H, size], then in the
layout of the recipe; of o, the mixer's output; and of x, the layer's input [B, T, D].
"""

from __future__ import annotations

import random
from dataclasses import dataclass, fields, replace
from typing import Any


@dataclass(frozen=True)
class Layout:
    """How operands lie while they are mixed: `axes` in einsum's letters, `to` and `back` from and to [B, T, H, K]."""

    axes: str
    to: str
    back: str

    @property
    def time(self) -> int:
        """The axis of time."""
        return self.axes.index("t")

    @property
    def lead(self) -> str:
        """The other axes."""
        return self.axes.replace("t", "")


LAYOUTS = {
    "BTHD": Layout("bth", "{0}", "{0}"),
    "BHTD": Layout("bht", "{0}.transpose(1, 2)", "{0}.transpose(1, 2)"),
    "TBHD": Layout("tbh", "{0}.transpose(0, 1)", "{0}.transpose(0, 1)"),
    "merged": Layout("nt", "{0}.transpose(1, 2).flatten(0, 1)", "{0}.unflatten(0, (b, H)).transpose(1, 2)"),
}

# What happens to q and k, each [B, T, G, K].
FEATURES = {
    "none": "",
    "elu + 1": "q, k = F.elu(q) + 1, F.elu(k) + 1",
    "relu": "q, k = q.relu(), k.relu()",
    "silu": "q, k = F.silu(q), F.silu(k)",
    "softmax of features": "q, k = q.softmax(-1), k.softmax(-1)",
    "l2": "q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)",
    "signed": "k = torch.where(k > 0, k, 0.1 * k)",
    "scaled": "q = q * K**-0.5",
}

# How G heads of q and k become H.
GROUPS = {
    "repeat": "q, k = q.repeat_interleave(H // G, 2), k.repeat_interleave(H // G, 2)",
    "expand": "q, k = (y[:, :, :, None].expand(b, t, G, H // G, K).reshape(b, t, H, K) for y in (q, k))",
}

# The log decay g, [B, T, H] or, where the name says so, [B, T, H, K]: what __init__ makes, and what forward does.
DECAYS = {
    "none": ("", ""),
    "fixed": ("self.rate = 0.03", "g = -self.rate * torch.ones(b, t, H)"),
    "fixed, a buffer": (
        'self.register_buffer("gamma", torch.tensor([0.9, 0.97]))',
        "g = self.gamma.log().expand(b, t, H)",
    ),
    "gate": ("self.a = nn.Linear(D, H)", "g = F.logsigmoid(self.a(x) + 3) / 4"),
    "dt": (
        "self.a, self.rate = nn.Linear(D, H), nn.Parameter(torch.zeros(H))",
        "g = -0.05 * self.rate.exp() * F.softplus(self.a(x))",
    ),
    "channel": ("self.a = nn.Linear(D, H * K)", "g = F.logsigmoid(self.a(x) + 3).view(b, t, H, K) / 4"),
}

# How the mixing is written (see program.py).
SPELLINGS = {  # and how often
    "quadratic": 6,
    "cumulative": 4,
    "chunk loop": 3,
    "doubling": 2,
    "token loop": 1,
    "step function": 1,
    "delta loop": 1,
}

# Masks of the quadratic form; `i` counts tokens.
MASKS = {
    "tril": "scores = scores.tril()",
    "times": "scores = scores * (i[:, None] >= i)",
    "fill": "scores = scores.masked_fill(i[:, None] < i, 0.0)",
    "where": "scores = torch.where(i[:, None] >= i, scores, 0.0)",
}

# Statements in place: on x, on the operands before they are mixed, on the output.
IN_PLACE = {
    "nothing": ("", "", ""),
    "input": ("x = x.clone()\nx += 0.5", "", ""),
    "values": ("", "v = v + 0\nv.mul_(2.0)", ""),
    "a channel of q": ("", "q = q.clone()\nq[..., 0] = 1.0", ""),
    "the first value": ("", "v = v.clone()\nv[:, 0] = 0.0", ""),
    "output, method": ("", "", "o.mul_(0.5)"),
    "output, operator": ("", "", "o = o.clone()\no *= 0.5"),
    "a view of it": ("", "", "o = o.clone()\nhalf = o[..., :2]\nhalf *= 2"),
    "relu": ("", "", "o = F.relu(o, inplace=True)"),
    "a column": ("", "", "o = o + 0\no[..., 0].add_(1.0)"),
}

# What is done with the output [B, T, H, V], beside other reads of the operands.
AROUND = {
    "nothing": ("", ""),
    "gate": ("self.gate = nn.Linear(D, H * V)", "o = o * self.gate(x).view(b, t, H, V).sigmoid()"),
    "norm": ("", "o = F.layer_norm(o, (V,))"),
    "a skip": ("self.skip = nn.Parameter(torch.ones(H, 1))", "o = o + self.skip * v"),
    "another reader": ("", "o = o + 0.1 * k.mean(-1, keepdim=True)"),
    "silu": ("", "o = F.silu(o)"),
    "clamp": ("", "o = o.clamp(-2, 2)"),
}

# What a model does with its layers.
MODELS = {
    "residual": "for layer in self.layers:\n    x = x + layer(x)\nreturn x",
    "a dict": 'for layer in self.layers:\n    x = x + layer(x)\nreturn {"out": x, "size": x.shape[1]}',
    "a tuple": "for layer in self.layers:\n    x = x + layer(x)\nreturn x, None",
    "checkpoint": "for layer in self.layers:\n    x = x + checkpoint(layer, x, use_reentrant=False)\nreturn x",
    "twice": "for layer in self.layers:\n    x = x + layer(x) + layer(0.5 * x)\nreturn x",
    "autocast": (
        "with torch.autocast('cpu', dtype=torch.bfloat16):\n    for layer in self.layers:\n        x = x + layer(x)\n"
        "return x"
    ),
    "time first": "for layer in self.layers:\n    x = x + layer(x.transpose(0, 1).transpose(0, 1))\nreturn x",
}

# Hooks and the like, on the layers `hooked` of a model.
HOOKS = {
    "none": "",
    "output": "layer.register_forward_hook(lambda module, args, out: out * 0.5)",
    "before the end": "layer.out.register_forward_pre_hook(lambda module, args: (args[0] * 2,))",
    "a projection": "layer.k.register_forward_hook(lambda module, args, out: out + 0.1)",
    "a graph break": "layer.out.register_forward_pre_hook(lambda module, args: torch._dynamo.graph_break())",
    "frozen": "layer.q.requires_grad_(False)",
    "weight norm": "nn.utils.parametrizations.weight_norm(layer.v)",
}


def hooked(recipe: Recipe) -> str:
    """The layers that have the hook: the first, or all where equal layers are compiled one by one.

    Dynamo shares code between those and does not ask whether a module has a hook (`skip_nnmodule_hook_guards`): with
    the backend "eager", too, the hook of one of them is lost.
    """
    return "model.layers" if recipe.runner == "layer by layer" else "model.layers[:1]"


# How the model is held and called: `compile` makes the compiled function (or, in the control, nothing).
RUNNERS = {
    "the model": "return compile(model)",
    "dynamic": "return compile(model, dynamic=True)",
    "its forward": "return compile(model.forward)",
    "closure": "return compile(lambda x: model(x))",
    "dict": 'held = {"model": [model]}\nreturn compile(lambda x: held["model"][0](x))',
    "partial": "def call(f, x):\n    return f(x)\n\nreturn compile(functools.partial(call, model))",
    "any arguments": "def call(*args, **kwargs):\n    return model(*args, **kwargs)\n\nreturn compile(call)",
    "an attribute": "holder = types.SimpleNamespace(model=model)\nreturn compile(lambda x: holder.model(x))",
    "inside another": "outer = nn.Sequential(nn.Identity(), model)\nreturn compile(outer)",
    "functional": (
        "def call(x):\n    return torch.func.functional_call(model, dict(model.named_parameters()), (x,))\n\n"
        "return compile(call)"
    ),
    "layer by layer": "for layer in model.layers:\n    layer.forward = compile(layer.forward)\nreturn model",
}


# Changes that make a mixer something else, or the same mixer with other gradients or premises: texts of the program and
# what is put in their place. A program can be mutated so if it has one of the texts; those with "#" mark a place.
MUTATIONS = {
    "softmax": (("# scores", "scores = scores.masked_fill(i[:, None] < i, -1e9).softmax(-1)"),),
    "relu of scores": (("# scores", "scores = scores.relu()"),),
    "cubed scores": (("# scores", "scores = scores**3"),),
    "clamped scores": (("# scores", "scores = scores.clamp(-20, 20)"),),
    "scores over T": (("# scores", "scores = scores / t"),),
    "window": (("# scores", "scores = scores.triu(-5)"),),
    "blocks": (("# scores", "scores = scores * (i[:, None] // 8 == i // 8)"),),
    "strictly before": (("# scores", "scores = scores.tril(-1)"), ("state, outs = x", "outs = []\nstate, late = x")),
    "one ahead": ((".tril()", ".tril(1)"), ("i[:, None] >= i", "i[:, None] + 1 >= i")),
    "the other way": (
        (".cumsum(TIME)  # of states", ".flip(TIME).cumsum(TIME).flip(TIME)"),
        ("in range(t)", "in reversed(range(t))"),
    ),
    "saturated state": (("state = state + ", "state = state.tanh() + "), ("# states", "states = states.tanh()")),
    "clamped state": (
        ("state = state + ", "state = state.clamp(-9, 9) + "),
        ("# states", "states = states.clamp(-9, 9)"),
    ),
    "a state detached": (("new = ", "state = state.detach() if i == 4 else state\nnew = "),),
    "k detached": (("# mixing", "k = k.detach()"),),
    "half of q detached": (("# mixing", "q = (q + q.detach()) / 2"),),
    "no_grad": (("# mixing", "with torch.no_grad():\n    v = v * 1.5"),),
    "gradient scaled": (("# mixing", "v = Scaled.apply(v)"),),
    "values without their mean": (("# mixing", "v = v - v.mean(TIME, keepdim=True)"),),
    "values in another order": (("# mixing", "v = v.flip(TIME)"),),
    "over the root of T": (("# mixed", "o = o * t**-0.5"),),
    "long sequences": (("# mixed", "o = o * 2 if t > 20 else o"),),
    "by position": (
        ("# mixed", "o = o / (1 + torch.arange(t) % 7).view([t if n == TIME else 1 for n in range(o.dim())])"),
    ),
    "in training": (("# mixed", "o = o * 2 if self.training else o"),),
    "output detached": (("# mixed", "o = o.detach()"),),
}


@dataclass(frozen=True)
class Recipe:
    """One program: a name of each table. `mutation` is "" for a program that is a mixer."""

    layout: str
    feature: str
    group: str
    decay: str
    spelling: str
    mask: str
    in_place: str
    around: str
    model: str
    hook: str
    runner: str
    layers: int
    lengths: tuple[int, int, int]
    mutation: str = ""

    def __str__(self) -> str:
        return ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self))


def draw(seed: str) -> Recipe:
    """A recipe; each seed gives one. Most of what is around the mixer is plain, so that things meet two at a time."""
    r = random.Random(seed)

    def seldom(table: dict[str, Any]) -> str:
        return next(iter(table)) if r.random() < 0.5 else r.choice(list(table))

    (spelling,) = r.choices(list(SPELLINGS), list(SPELLINGS.values()))
    decay = {"doubling": "none", "delta loop": r.choice(("none", "gate"))}.get(spelling, r.choice(list(DECAYS)))
    loop = "loop" in spelling or spelling == "step function"  # unrolled, so few tokens
    short = r.choice((1, 2, 3 if loop else r.randint(5, 11)))
    lengths = (6, 8, short) if loop else (r.randint(12, 20), 40, short)
    recipe = Recipe(
        layout=r.choice(list(LAYOUTS)),
        feature="l2" if spelling == "delta loop" else r.choice(list(FEATURES)),
        group=r.choice(list(GROUPS)),
        decay=decay,
        spelling=spelling,
        mask=r.choice(list(MASKS)),
        in_place=seldom(IN_PLACE),
        around=seldom(AROUND),
        model=seldom(MODELS),
        hook=seldom(HOOKS),
        runner=r.choice(list(RUNNERS)),
        layers=r.choice((1, 1, 2)),
        lengths=lengths,
    )
    if recipe.model == "checkpoint" and recipe.hook == "a graph break":  # Dynamo makes no graph at all of these
        return replace(recipe, hook="none")
    if recipe.feature == "relu" and short < 3:  # one score may well be zero, and its level weight has no gradient then
        recipe = replace(recipe, lengths=(*lengths[:2], 3))
    if recipe.in_place == "the first value" and short == 1:  # all that there is to weigh is zero then
        recipe = replace(recipe, lengths=(*lengths[:2], 2))
    if recipe.model == "autocast" and recipe.around == "clamp":  # a rounding at its edge decides about a gradient
        return replace(recipe, around="nothing")
    return recipe
