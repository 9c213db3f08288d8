"""Convert a language model, train its level weights alone in plain PyTorch, and keep them in a file of their own.

python examples/finetune.py --steps 20

The model is a small Mamba-2 with random weights, the text the source of Python's own modules, byte by byte. With your
model, replace `build` and `windows`.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Mamba2Config, Mamba2ForCausalLM

import llcompile

SIZES = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 16}


def build() -> Any:
    """Build the model; load your own here."""
    torch.manual_seed(0)
    return Mamba2ForCausalLM(Mamba2Config(**SIZES, state_size=16, n_groups=1, chunk_size=32))


def windows(length: int, batch: int, seed: int = 0) -> Iterator[Tensor]:
    """Yield random windows [batch, length] of the text, without end."""
    text = torch.tensor(list(Path(argparse.__file__).read_bytes()))
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(text) - length, (batch, 1), generator=generator)
        yield text[starts + torch.arange(length)]


def loss_of(run: Any, ids: Tensor) -> Tensor:
    """Return the next-token loss."""
    logits = run(ids, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def main(arguments: Sequence[str] | None = None) -> None:
    """Convert, freeze, train, save, load."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--length", type=int, default=128, help="number of bytes in a window")
    parser.add_argument("--level-weights", default="linear", help="kind of level weights")
    parser.add_argument("--level-lr", type=float, default=1e-2, help="learning rate of the level weights")
    parser.add_argument("--inner", default="inductor", choices=("inductor", "aot_eager", "eager"))
    args = parser.parse_args(arguments)

    model, data = build(), windows(args.length, batch=4)
    # Convert before you build the optimizer, so that it holds the level weights.
    print(llcompile.convert(model, next(data), use_cache=False, options={"level_weights": args.level_weights}))
    print(llcompile.freeze_except_levels(model))
    optimizer = torch.optim.AdamW(llcompile.parameter_groups(model, lr=args.level_lr / 10, level_lr=args.level_lr))
    run = torch.compile(model, backend="loglinear", options={"inner": args.inner})

    held_out = next(windows(args.length, batch=8, seed=1))
    before = loss_of(run, held_out).item()
    for step in range(args.steps):
        loss = loss_of(run, next(data))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    after = loss_of(run, held_out).item()
    print(f"the level weights, and nothing else, moved the held-out loss from {before:.4f} to {after:.4f}")

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "levels.safetensors"
        count = llcompile.save_levels(model, file)
        print(f"level weights of {count} mixers: {file.stat().st_size / 1024:,.0f} KiB")
        again = build()  # the model as it was, not converted
        llcompile.load_levels(again, file)
    rerun = torch.compile(again, backend="loglinear", options={"inner": args.inner})
    print(f"loaded into a fresh model: held-out loss {loss_of(rerun, held_out).item():.4f}")


if __name__ == "__main__":
    main()
