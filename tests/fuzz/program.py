"""Writes the program of a recipe: a text that stands by itself."""

from __future__ import annotations

import inspect
import random
import textwrap
from dataclasses import replace
from pathlib import Path

from tests.fuzz import check
from tests.fuzz.mixing import mixing
from tests.fuzz.recipes import (
    AROUND,
    DECAYS,
    FEATURES,
    GROUPS,
    HOOKS,
    IN_PLACE,
    LAYOUTS,
    MODELS,
    MUTATIONS,
    RUNNERS,
    Recipe,
    draw,
    hooked,
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
        *mixing(recipe),
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
        hook=_indented(4, *_hooks(recipe)),
        runner=_indented(4, RUNNERS[recipe.runner]),
        check=_CHECK,
    )
    if recipe.model == "autocast":
        text = text.replace("\nTOLERANCE = 2e-4\n", f"\nTOLERANCE = {_ROUGH}\n")
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


def _hooks(recipe: Recipe) -> list[str]:
    hook = HOOKS[recipe.hook]
    return [f"for layer in {hooked(recipe)}:", f"    {hook}"] if hook else []


def _indented(by: int, *pieces: str) -> str:
    return textwrap.indent("\n".join(piece for piece in pieces if piece), " " * by)


_ROUGH = 5e-2  # in 16 bits
_SOURCE = Path(inspect.getfile(check)).read_text()
# check.py without its docstring and its imports, which go to the top.
_IMPORTS, _CHECK = (part.strip() for part in _SOURCE.split("\n\n\n", 1))
_IMPORTS = _IMPORTS.split('"""')[-1].replace("from __future__ import annotations\n", "").strip()
