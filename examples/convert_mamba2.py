"""Convert a small Mamba-2 of transformers, train its level weights for a few steps, store and restore them.

python examples/convert_mamba2.py --steps 20
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import Mamba2Config, Mamba2ForCausalLM

import llcompile

SIZES = {"vocab_size": 64, "hidden_size": 64, "num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1}


def build() -> Mamba2ForCausalLM:
    """A model with random weights; put your own here."""
    torch.manual_seed(0)
    return Mamba2ForCausalLM(Mamba2Config(num_hidden_layers=2, **SIZES))


def train(model: torch.nn.Module, tokens: torch.Tensor, steps: int) -> float:
    """Train the level weights alone and return the last loss."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".loglinear." in name)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    loss = torch.tensor(float("nan"))
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        print(f"step {step + 1:3d}  loss {loss.item():.4f}", flush=True)
    return loss.item()


def main() -> None:
    """Convert, train, store, restore."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args().steps
    tokens = torch.randint(64, (4, 128))

    model = build()
    print(llcompile.convert(model, tokens))
    model.compile(backend="loglinear")
    with torch.no_grad():
        before = model(tokens).logits
    train(model, tokens, steps)
    with torch.no_grad():
        moved = (model(tokens).logits - before).abs().max().item()
    print(f"trained: the level weights, and nothing else, moved the logits by {moved:.2f}")
    assert moved > 1e-3, "the level weights do not act"

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "weights.pt"
        torch.save(model.state_dict(), file)
        again = build()
        llcompile.convert(again, tokens)  # first the places for the level weights, then the weights
        again.load_state_dict(torch.load(file))
        again.compile(backend="loglinear")
        with torch.no_grad():
            difference = (model(tokens).logits - again(tokens).logits).abs().max().item()
    print(f"stored and restored: the logits differ by {difference:.1e}")


if __name__ == "__main__":
    main()
