"""Convert a language model and train it with transformers' Trainer: level weights alone, or together with the rest.

python examples/finetune_trainer.py --steps 20
python examples/finetune_trainer.py --steps 20 --all

Needs accelerate, as the Trainer does. The model is a small Mamba-2 with random weights, the text the source of
Python's own modules, byte by byte.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Mamba2Config, Mamba2ForCausalLM, Trainer, TrainingArguments

import llcompile

SIZES = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 16}


class Windows(Dataset[dict[str, Tensor]]):
    """The text, cut into windows of `length` bytes."""

    def __init__(self, length: int) -> None:
        text = torch.tensor(list(Path(argparse.__file__).read_bytes()))
        self.rows = text[: len(text) // length * length].view(-1, length)

    def __len__(self) -> int:
        """Return how many windows there are."""
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return one window; the Trainer shifts the labels."""
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def main(arguments: Sequence[str] | None = None) -> None:
    """Convert, train, save, open."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--length", type=int, default=128, help="number of bytes in a window")
    parser.add_argument("--all", action="store_true", help="train all weights, the level weights at ten times the rate")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of the model's own weights")
    parser.add_argument("--inner", default="inductor", choices=("inductor", "aot_eager", "eager"))
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    model: Any = Mamba2ForCausalLM(Mamba2Config(**SIZES, state_size=16, n_groups=1, chunk_size=32, use_cache=False))
    data = Windows(args.length)
    print(llcompile.convert(model, data.rows[:2]))
    if not args.all:
        print(llcompile.freeze_except_levels(model))
    # Without options of the backend, TrainingArguments(torch_compile_backend="loglinear") does the same.
    model.compile(backend="loglinear", options={"inner": args.inner})
    optimizer = torch.optim.AdamW(llcompile.parameter_groups(model, lr=args.lr, weight_decay=0.1))
    start = [p.detach().clone() for p in model.parameters()]

    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            max_steps=args.steps,
            per_device_train_batch_size=4,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = Trainer(model, settings, train_dataset=data, optimizers=(optimizer, None))
        trainer.train()
        trainer.save_model(folder)  # config.json tells of the level weights
        again: Any = AutoModelForCausalLM.from_pretrained(folder)
    again.compile(backend="loglinear", options={"inner": args.inner})
    levels = {id(p) for p in llcompile.level_parameters(model)}
    moved = [id(p) in levels for p, old in zip(model.parameters(), start, strict=True) if not torch.equal(p, old)]
    what = "the level weights, and nothing else, moved" if all(moved) else "the level weights moved, and all others"
    print(f"{what}: {sum(moved)} of {len(levels)} of their tensors, {len(moved) - sum(moved)} others")
    with torch.no_grad():
        ids = data.rows[:2].to(again.device)
        model.eval()
        same = torch.allclose(again(ids).logits, model(ids.to(model.device)).logits.to(again.device), atol=1e-4)
    print(f"opened again with from_pretrained: {'the same logits' if same else 'OTHER LOGITS'}")


if __name__ == "__main__":
    main()
