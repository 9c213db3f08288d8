"""Serve a converted model: prefill a prompt, then stream tokens through the model's own cache, with a progress line.

python examples/generate.py mamba2 --tokens 64
python examples/generate.py qwen3_next --prompt-length 100 --sample

MODEL is one of the two small models of `make demo`, a path to a transformers config.json or to a JSON file
{"model_type": ..., "kwargs": {...}}, or a name in a file of such models (--zoo, or the environment variable
LLCOMPILE_ZOO). Weights are random, so the text is meaningless. The example streams tokens and prints the number of
compiled graphs, the size of the cache, and the effect of the level weights.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Group
from rich.live import Live
from rich.text import Text
from torch._dynamo.utils import counters
from transformers.generation.streamers import BaseStreamer

import llcompile
from demo.models import TOUR

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


class Stream(BaseStreamer):
    """Show tokens as they are generated, with progress and speed below. In a file, only the last view is written."""

    def __init__(self, total: int, prompt: int) -> None:
        self.total, self.prompt, self.tokens = total, prompt, list[str]()
        self.start = time.perf_counter()
        self.live = Live(auto_refresh=False, vertical_overflow="visible")
        self.prefilled = False

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt first, then one token per row at a time."""
        if not self.prefilled:
            self.prefilled = True
            return
        if not self.tokens:
            seconds = time.perf_counter() - self.start
            print(f"prefill of {self.prompt} tokens, compilation included: {seconds:.1f} s")
            self.start = time.perf_counter()
            self.live.start()
        self.tokens.append(str(value.flatten()[0].item()))
        rate = (len(self.tokens) - 1) / max(time.perf_counter() - self.start, 1e-9)
        progress = f"[{len(self.tokens)}/{self.total} tokens, {rate:.1f}/s]"
        self.live.update(Group(Text(" ".join(self.tokens)), Text(progress)), refresh=True)

    def end(self) -> None:
        """Stop after the last token."""
        self.live.stop()


def build(spec: str, zoo: Path | None = None) -> Any:
    """Build the model that MODEL names, with random weights, in evaluation mode."""
    path = Path(spec)
    if path.suffix == ".json":
        entry = json.loads(path.read_text())
        name, entry = entry["model_type"], entry if "kwargs" in entry else {"kwargs": entry}
    else:
        known = {name: {"kwargs": {**SPECIAL, **sizes}} for name, sizes in TOUR}
        known |= json.loads(zoo.read_text()) if zoo else {}
        if spec not in known:
            raise SystemExit(f"{spec!r} is neither one of {', '.join(known)} nor a .json file.")
        name, entry = spec, known[spec]
    sizes = {key: value for key, value in entry["kwargs"].items() if key != "model_type"}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **sizes)
    return getattr(transformers, entry.get("class", "AutoModelForCausalLM")).from_config(config).eval()


def check_acts(model: Any, prompt: torch.Tensor) -> float:
    """Return how far noise on the level weights moves the logits; restore the level weights."""
    kept = {name: p.detach().clone() for name, p in model.named_parameters() if ".loglinear." in name}
    with torch.no_grad():
        before = model(prompt).logits
        for name in kept:
            torch.nn.init.normal_(model.get_parameter(name))
        moved = (model(prompt).logits - before).abs().max().item()
        for name, value in kept.items():
            model.get_parameter(name).copy_(value)
    if not moved > 1e-3:
        raise SystemExit(f"the level weights do not act: noise on them moves the logits by {moved:.1e}")
    return moved


def held_states(cache: Any) -> list[torch.Tensor]:
    """Return every recurrent state in a cache of transformers."""
    layers = getattr(cache, "layers", [])
    return [s for layer in layers for s in getattr(layer, "recurrent_states", {}).values() if s is not None]


def main() -> None:
    """Build, convert, compile, generate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    zoo = os.environ.get("LLCOMPILE_ZOO")
    parser.add_argument("--zoo", type=Path, default=zoo and Path(zoo), help="JSON file with more models, by name")
    parser.add_argument("--prompt-length", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=32, help="number of tokens to generate")
    parser.add_argument("--sample", action="store_true", help="sample instead of taking the most likely token")
    parser.add_argument("--inner", default="inductor", choices=("inductor", "aot_eager", "eager"))
    args = parser.parse_args()

    model = build(args.model, args.zoo)
    prompt = torch.randint(3, model.config.get_text_config().vocab_size, (1, args.prompt_length))
    print(llcompile.convert(model, prompt))
    model.compile(backend="loglinear", options={"inner": args.inner})
    counters.clear()
    with torch.no_grad():
        out = model.generate(
            prompt,
            max_new_tokens=args.tokens,
            do_sample=args.sample,
            eos_token_id=None,
            streamer=Stream(args.tokens, args.prompt_length),
            return_dict_in_generate=True,
        )
    states = held_states(out.past_key_values) or held_states(getattr(out, "cache_params", None))
    size = sum(state.numel() * state.element_size() for state in states)
    print(f"{counters['stats']['unique_graphs']} graphs; {len(states)} recurrent states, {size / 1024:,.0f} KiB")
    for state in states[:1]:
        print(f"the first: {list(state.shape)}" + (", [B, H, 1 + levels, K, V]" if state.dim() == 5 else ""))
    print(f"the level weights act: noise on them moves the logits by {check_acts(model, prompt):.2f}")


if __name__ == "__main__":
    main()
