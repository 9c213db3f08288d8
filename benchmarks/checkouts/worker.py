"""Inspects and converts models with the llcompile that PYTHONPATH leads to; prints one line of JSON for each job.

A file of its own folder, run by its path: what stands beside it is then all that it adds to the other checkout's path.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch

import llcompile


def spelling(name: str) -> tuple[Any, tuple[Any, ...]]:
    """A layer of the checkout's corpus, with inputs."""
    corpus = import_module("tests.spellings")
    entry = corpus.POSITIVE.get(name) or corpus.NEGATIVE[name]
    return entry.make(), entry.example()


def zoo(config: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    """A model of transformers, with 64 tokens for two rows."""
    import transformers

    kwargs = dict(config["kwargs"])
    made = transformers.AutoConfig.for_model(config["model_type"], **kwargs)
    torch.manual_seed(0)
    model = getattr(transformers, config["class"]).from_config(made).eval()
    return model, (torch.randint(0, kwargs.get("vocab_size", 128), (2, 64)),)


def said(report: Any) -> list[list[str]]:
    """What a report says of each mixer: its module, and what became of it."""
    rows = [[r.module, "converted", r.origin, str(r.family)] for r in report.converted]
    rows += [[r.module, "declined", "", ""] for r in report.declined]
    return sorted(rows + [[r.module, "untouched", r.kind, ""] for r in report.untouched])


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """What `run` returns, and the seconds of CPU time that it took in all threads."""
    start = time.process_time()
    return run(), time.process_time() - start


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """The report of one job, and the seconds of each step."""
    make = (lambda: spelling(job["name"])) if "config" not in job else (lambda: zoo(job["config"]))
    torch.set_num_threads(1)
    model, inputs = make()
    torch._dynamo.reset()
    look, inspect_seconds = timed(partial(llcompile.inspect, model, *inputs))
    found = {"said": said(look), "inspect": inspect_seconds}
    for verify in job["convert"]:
        model, inputs = make()
        torch._dynamo.reset()
        report, seconds = timed(partial(llcompile.convert, model, *inputs, verify=verify))
        found["convert, verified" if verify else "convert"] = seconds
        found["converted"] = said(report)
    return found


if __name__ == "__main__":
    for job in json.load(sys.stdin):
        try:
            result = measure(job)
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"}
        print("\n" + json.dumps({"name": job["name"], **result}), flush=True)
