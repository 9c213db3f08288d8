"""Serve a converted model: prefill a prompt, then stream tokens through the model's own cache, with a progress line.

python examples/generate.py mamba2 --tokens 64
python examples/generate.py path/to/model.json --prompt-length 500 --sample

MODEL is a name in a zoo file (--zoo, or the environment variable LLCOMPILE_ZOO), or a path to a JSON file
{"model_type": ..., "kwargs": {...}}, or to a config.json of transformers. Weights are random, so what is written makes
no sense; what is shown is that it streams, from how many graphs, and what the cache holds.
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

ZOO = Path(os.environ.get("LLCOMPILE_ZOO", "/work/shared/zoo.json"))


class Stream(BaseStreamer):
    """Shows tokens as they come, and below them how far it is and how fast. Into a file, only the last view goes."""

    def __init__(self, total: int, prompt: int) -> None:
        self.total, self.prompt, self.tokens = total, prompt, list[str]()
        self.start = time.perf_counter()
        self.live = Live(auto_refresh=False, vertical_overflow="visible")
        self.prefilled = False

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt first, then one token a row at a time."""
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
        """The last token is there."""
        self.live.stop()


def build(spec: str, zoo: Path = ZOO) -> Any:
    """The model that MODEL names, with random weights, in evaluation mode."""
    path = Path(spec)
    if path.suffix == ".json":
        entry = json.loads(path.read_text())
        name, entry = entry["model_type"], entry if "kwargs" in entry else {"kwargs": entry}
    else:
        known = json.loads(zoo.read_text()) if zoo.is_file() else {}
        if spec not in known:
            raise SystemExit(f"{spec!r} is not in {zoo}; it has {', '.join(known) or 'nothing'}. Or give a .json file.")
        name, entry = spec, known[spec]
    sizes = {key: value for key, value in entry["kwargs"].items() if key != "model_type"}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **sizes)
    return getattr(transformers, entry.get("class", "AutoModelForCausalLM")).from_config(config).eval()


def held_states(cache: Any) -> list[torch.Tensor]:
    """Every recurrent state that a cache of transformers holds."""
    layers = getattr(cache, "layers", [])
    return [s for layer in layers for s in getattr(layer, "recurrent_states", {}).values() if s is not None]


def main() -> None:
    """Build, convert, compile, generate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--zoo", type=Path, default=ZOO, help=f"file of named configs (default {ZOO})")
    parser.add_argument("--prompt-length", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=32, help="how many to write")
    parser.add_argument("--sample", action="store_true", help="sample instead of the likeliest token")
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


if __name__ == "__main__":
    main()
