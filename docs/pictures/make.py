"""Make the pictures of the README: python docs/pictures/make.py [FOLDER]

report.svg shows the report of llcompile.convert on the model below; the others draw committed measurements.
"""

from __future__ import annotations

import io
import re
import sys
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from torch import nn
from transformers import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

import llcompile
from llcompile.commands import cli

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
MEASURED = {
    "operator.svg": ROOT / "benchmarks/results/operator-cpu-2026-11-27.json",
    "speed.svg": ROOT / "benchmarks/results/rewrite-cpu-2026-11-21.json",
}


class Retention(nn.Module):
    """Scores of all pairs of tokens, each multiplied by the decay between the two."""

    window: int | None = None

    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.qkv, self.fade = heads, nn.Linear(width, 3 * width), nn.Linear(width, heads)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # noqa: D102
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, -1).unbind(2)
        total = nn.functional.logsigmoid(self.fade(x)).cumsum(1)
        decay = total[:, :, None] - total[:, None, :]
        seen = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        if self.window is not None:
            seen = seen.triu(1 - self.window)
        decay = decay.masked_fill(~seen[..., None], -torch.inf).exp()
        scores = torch.einsum("bihd,bjhd->bijh", q, k) * decay
        return self.out(torch.einsum("bijh,bjhd->bihd", scores, v).flatten(2))


class Window(Retention):
    """A near miss: what is older than 32 tokens is dropped."""

    window = 32


class Softmax(Retention):
    """Not linear-time."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # noqa: D102
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Hybrid(nn.Module):
    """One layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": 64, "num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1}
        mamba = Mamba2Mixer(Mamba2Config(**sizes), layer_idx=0)
        self.layers = nn.ModuleList([mamba, Retention(), Window(), Softmax()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # noqa: D102
        for layer in self.layers:
            x = x + layer(x)
        return x


def report(path: Path) -> None:
    """Draw the report as a terminal shows it."""
    torch.manual_seed(0)
    found = llcompile.convert(Hybrid(), torch.randn(1, 128, 64))
    nearby = [replace(d, where=d.where.replace(f"{ROOT}/", "")) for d in found.declined]
    found = replace(found, declined=tuple(nearby))  # the path of one machine says nothing to others
    console = Console(record=True, width=126, file=io.StringIO(), highlight=False)
    console.print(">>> print(llcompile.convert(model, x))", style="bold")
    console.print(found)
    drawn = console.export_svg(title="", unique_id="report")
    path.write_text(re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL))


def main() -> None:
    """Write all files."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    report(folder / "report.svg")
    drawn = [cli.main(["bench", "plot", str(file), "--out", str(folder / name)]) for name, file in MEASURED.items()]
    raise SystemExit(max(drawn))


if __name__ == "__main__":
    main()
