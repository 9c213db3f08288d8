"""Train transformers' Mamba-2 on associative recall, convert it, continue training, and print the accuracies.

python examples/train_recall.py --steps 2000 --more 800

`llcompile demo` does this in three ways and compares them; this example trains all weights at once.
"""

from __future__ import annotations

import argparse

import torch

import llcompile
from demo.acting import check_acts
from demo.models import recall_model
from demo.recall import Exam, Task
from demo.training import ARMS, Plan, Runner, learn


def main() -> None:
    """Train, convert, train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=Plan.steps, help="training steps before conversion")
    parser.add_argument("--more", type=int, default=Plan.more, help="training steps after conversion")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    task, plan = Task(), Plan()
    exam = Exam(task)
    model = recall_model(task, args.seed)
    linear = Runner(model, torch.compile(model))
    weights = [{"params": list(model.parameters()), "lr": plan.rate}]
    learn(linear, exam, plan, weights, args.steps, seed=1)
    print(f"linear, {args.steps} steps: {linear.accuracy(exam).overall:.3f}")

    # The same model object: convert adds level weights to it, and from then on it runs through the backend.
    print(llcompile.convert(model, exam.batches[0].tokens, use_cache=False))
    converted = Runner(model, torch.compile(model, backend="loglinear"))
    print(f"converted: {converted.accuracy(exam).overall:.3f}")
    print(check_acts(model, lambda: converted.logits(exam.batches[0].tokens), "the model"))

    everything = next(arm for arm in ARMS if arm.name == "all weights")
    learn(converted, exam, plan, everything.groups(model, plan), args.more, seed=2)
    print(f"log-linear, {args.more} more steps: {converted.accuracy(exam).overall:.3f}")


if __name__ == "__main__":
    main()
