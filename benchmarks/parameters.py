"""How many parameters level weights add to transformers' models with their default configs, on the meta device.

    python -m benchmarks.parameters [MODEL_TYPE ...]

Prints a table of docs/level-weights.md: what `linear` level weights would add and what the default adds, as a number
and as a share of the model's own parameters. Four layers are converted, and their mixers counted in the whole model.
"""

from __future__ import annotations

import argparse

import torch
import transformers
from torch import nn

import llcompile
from llcompile import LevelWeights
from llcompile.weights.default_kind import parameters
from llcompile.weights.level_kinds import Sizes

MODELS = ("mamba2", "mamba", "falcon_h1", "qwen3_5_text")
LAYERS, LENGTH = 4, 64


def main() -> None:
    """Print a row for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS, metavar="MODEL_TYPE", help="default: %(default)s")
    for name in parser.parse_args().models:
        print(row(name), flush=True)


def row(name: str) -> str:
    """A row of the table, from the sizes of the level weights that `convert` attaches."""
    part, whole = built(name, num_hidden_layers=LAYERS), built(name)
    llcompile.convert(part, torch.zeros(1, LENGTH, dtype=torch.long, device="meta"), verify=False)
    own = sum(p.numel() for p in whole.parameters())
    # By the class of its owner: the level weights that each mixer gets.
    each = {type(m): found for m in part.modules() for found in m.children() if isinstance(found, LevelWeights)}
    mixers = [each[type(m)] for m in whole.modules() if type(m) in each]
    linear = sum(parameters("linear", Sizes(w.heads, w.levels, w.in_features or 0)) for w in mixers)
    chosen = sum(p.numel() for w in mixers for p in w.parameters())
    kinds = ", ".join(sorted({w.kind for w in mixers}))
    return (
        f"| `{name}`, {len(mixers)} mixers, {own / 1e9:.3g} billion | {linear / 1e6:,.0f} million | {linear / own:.2%} "
        f"| {kinds}: {chosen / 1e6:,.0f} million | {chosen / own:.2%} |"
    )


def built(model_type: str, **changes: int) -> nn.Module:
    """The model with its default config but for `changes`, without memory."""
    config = transformers.AutoConfig.for_model(model_type, **changes)
    config.use_cache = False
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config).eval()


if __name__ == "__main__":
    main()
