"""States between two calls: reordered, reset, stored, taken over from another model, and refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import llcompile
from llcompile.errors import LLCompileError, StateAdoptedWarning
from llcompile.kernels.state import position_of
from tests.helpers import small
from tests.helpers.small import difference
from tests.models import tiny
from tests.models.converted import compiled, lively
from tests.models.generating import some
from tests.models.serving import in_parts, serving

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

FAMILIES = ("mamba2", "qwen3_next", "kimi_linear")
WAYS = {
    "beams": {"num_beams": 3, "do_sample": False},
    "beams returned": {"num_beams": 4, "num_return_sequences": 3, "do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20, "num_return_sequences": 2},
}


@pytest.mark.usefixtures("warm_dynamo")
@pytest.mark.parametrize("name", some(FAMILIES, quick=("mamba2",)))
def test_ways_to_generate(name: str) -> None:
    """Beams (rows of states are reordered and copied) and sampling: as without a cache, in full forward passes."""
    model, ids = serving(name), tiny.tokens(2, 11)
    for way in WAYS.values():
        written = []
        for use_cache in (True, False):
            torch.manual_seed(5)
            out = model.generate(ids, max_new_tokens=8, eos_token_id=None, use_cache=use_cache, **way)
            written.append(out)
        assert torch.equal(*written), way


@pytest.mark.usefixtures("warm_dynamo")
def test_a_cache_is_reset_and_used_again() -> None:
    model, ids = serving("mamba2"), tiny.tokens(2, 20)
    with torch.no_grad():
        first = model(ids[:, :13], use_cache=True)
        cache = first.cache_params
        model(ids[:, 13:14], use_cache=True, cache_params=cache)
        assert states_of(cache)[0].shape[2] == 1 + 17
        assert position_of(states_of(cache)[0]).tolist() == [14, 14]
        cache.reset()
        assert position_of(states_of(cache)[0]).tolist() == [0, 0]
        again = model(ids[:, :13], use_cache=True, cache_params=cache)
        assert difference(again.logits, first.logits) < 1e-6
        assert position_of(states_of(cache)[0]).tolist() == [13, 13]


def states_of(cache: Any) -> list[Tensor]:
    return [layer.recurrent_states[0] for layer in cache.layers]


RESUME = """
import sys, torch
from tests.models.serving import serving
from tests.models import tiny
stored = torch.load(sys.argv[1], weights_only=True)
model = serving("mamba2")
with torch.no_grad():
    cache = model(tiny.tokens(2, 4), use_cache=True).cache_params
    for layer, (conv, state) in zip(cache.layers, stored["cache"], strict=True):
        layer.conv_states[0].copy_(conv)
        layer.recurrent_states[0].copy_(state)
    out = model(stored["next"], use_cache=True, cache_params=cache)
error = (out.logits - stored["logits"]).abs().max() / stored["logits"].abs().max()
print("error", float(error))
"""


@pytest.mark.slow
def test_a_cache_is_resumed_in_another_process(tmp_path: Path) -> None:
    model, ids = serving("mamba2"), tiny.tokens(2, 40)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        cache = model(ids[:, :37], use_cache=True).cache_params
    stored = [(layer.conv_states[0], layer.recurrent_states[0]) for layer in cache.layers]
    torch.save({"cache": stored, "next": ids[:, 37:], "logits": whole[:, 37:]}, tmp_path / "cache.pt")
    done = subprocess.run(
        [sys.executable, "-c", RESUME, str(tmp_path / "cache.pt")],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 1e-5


@pytest.mark.usefixtures("warm_dynamo")
def test_a_state_moves_and_is_copied_like_any_tensor() -> None:
    model, ids = serving("mamba2"), tiny.tokens(2, 20)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        cache = model(ids[:, :16], use_cache=True).cache_params
        cache.reorder_cache(torch.tensor([1, 0]))
        for layer in cache.layers:
            layer.recurrent_states[0] = layer.recurrent_states[0].to("cpu", copy=True)
        turned = model(ids[:, 16:].flip(0), use_cache=True, cache_params=cache).logits
        assert difference(turned.flip(0), whole[:, 16:]) < 1e-5


# -- states of others


@pytest.mark.parametrize("name", some(("mamba2", "qwen3_next"), quick=("mamba2",)))
def test_the_state_of_an_unconverted_model_is_taken_up(name: str) -> None:
    """As one level, with one warning; with level weights of 1 the model goes on as the linear one."""
    model, ids = lively(tiny.build(name)), tiny.tokens(2, 20)
    key = "cache_params" if name == "mamba2" else "past_key_values"
    with torch.no_grad():
        expected = torch.cat(list(in_parts(model, name, ids, (13, 1, 1, 1, 4))), dim=1)
        cache = model(ids[:, :13], use_cache=True)[key]
        llcompile.convert(model, ids, verify=False)
        run = compiled(model)
        parts = ids[:, 13:].split([1, 1, 1, 4], dim=1)
        with pytest.warns(StateAdoptedWarning, match="come from the unconverted model") as warned:
            logits = [tiny.logits(run(part, use_cache=True, **{key: cache})) for part in parts]
        assert difference(torch.cat(logits, 1), expected[:, 13:]) < 1e-5
    assert len([w for w in warned if "unconverted model" in str(w.message)]) == 1
    state = next(layer.recurrent_states[0] for layer in cache.layers if getattr(layer, "recurrent_states", None))
    assert state.dim() == 5
    assert position_of(state).tolist() == [7, 7]


class Stepper(small.DeltaMixer):
    """Its state is an argument."""

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

        o, state = torch_chunk_gated_delta_rule(*self.operands(x), initial_state=state, output_final_state=True)
        return x + self.out(o.flatten(-2)), state


WRONG = {
    "other heads": ((2, 3, 18, 8, 8), r"its shape is \[2, 3, 18, 8, 8\], expected \[B, 2, 1 \+ L, 8, 8\]"),
    "other widths": ((2, 2, 18, 4, 8), r"\[2, 2, 18, 4, 8\], expected \[B, 2, 1 \+ L, 8, 8\]"),
    "other levels": ((2, 2, 9, 8, 8), r"which is 8 levels, and the level weights have 17"),
    "other linear state": ((2, 2, 4, 8), r"its shape is \[2, 2, 4, 8\], expected \[B, 2, 8, 8\]"),
    "other batch": ((3, 2, 18, 8, 8), r"\[3, 2, 18, 8, 8\], for a batch of 3, but this batch has 2"),
}


@pytest.mark.parametrize("case", WRONG)
def test_the_state_of_another_model_is_an_error(case: str) -> None:
    mixer, x = Stepper(), torch.randn(2, 5, 16)
    shape, message = WRONG[case]
    llcompile.convert(mixer, x, verify=False)
    with torch.no_grad(), pytest.raises(LLCompileError, match=message):
        compiled(mixer)(x, torch.zeros(shape))


def test_a_state_with_levels_is_an_error_without_level_weights() -> None:
    mixer, x = Stepper(), torch.randn(2, 5, 16)
    run = compiled(mixer, options={"level_weights": "none"})
    with torch.no_grad(), pytest.raises(LLCompileError, match=r"level_weights='none'"):
        run(x, torch.zeros(2, 2, 18, 8, 8))


def test_a_position_beyond_what_a_state_counts_is_an_error() -> None:
    mixer, x = Stepper(), torch.randn(2, 5, 16)
    llcompile.convert(mixer, x, verify=False)
    state = torch.zeros(2, 2, 18, 8, 8)
    state[1, :, 0, 0, 0] = 2**24 - 4
    with (
        torch.no_grad(),
        pytest.raises(LLCompileError, match=r"position 16777212 in row 1 and 5 more tokens"),
    ):
        compiled(mixer)(x, state)
