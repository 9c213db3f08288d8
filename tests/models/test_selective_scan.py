"""Mamba-1 in transformers' models: converted, acting, and decoded through the models' own caches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import llcompile
from tests.helpers import small
from tests.helpers.small import difference
from tests.models import tiny
from tests.models.converted import weights_of
from tests.models.generating import some
from tests.models.serving import greedy, serving

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

NAMES = some(tuple(tiny.SELECTIVE), quick=("mamba",))
CACHES = dict.fromkeys(("mamba", "falcon_mamba"), "cache")


@pytest.mark.parametrize("name", NAMES)
def test_converts_and_acts(name: str) -> None:
    """Verified by `convert` itself: unchanged at level weights of 1, and each level weight has an effect."""
    report = llcompile.convert(tiny.build(name), tiny.tokens(2, 21))
    assert report.declined == ()
    assert [r.family for r in report.converted] == ["Mamba-1 (selective scan)"] * tiny.SELECTIVE_MIXERS[name]
    for record in report.converted:
        assert (record.decay, record.correction, record.origin, record.value_dim) == ("channel", "none", "function", 1)
        assert record.weight_sets == 1
    assert report.certificate is not None
    assert report.certificate.error < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_decodes_and_generates(name: str) -> None:
    """A prefill, then single tokens: the logits of one full pass; and `generate()` writes what full passes write."""
    model, ids = serving(name), tiny.tokens(2, 23)
    key = CACHES.get(name, "past_key_values")
    with torch.no_grad():
        whole = tiny.logits(model(ids, use_cache=False))
        for prefill, length in ((13, 23), (1, 6)):
            out = model(ids[:, :prefill], use_cache=True)
            parts = [tiny.logits(out)]
            for t in range(prefill, length):
                where = {} if key == "cache" else {"position_ids": torch.full((2, 1), t)}
                out = model(ids[:, t : t + 1], use_cache=True, **where, **{key: out[key]})
                parts.append(tiny.logits(out))
            assert difference(torch.cat(parts, dim=1), whole[:, :length]) < 1e-5
        written = model.generate(ids[:, :13], max_new_tokens=8, do_sample=False, eos_token_id=None)
        assert torch.equal(written, greedy(model, ids[:, :13], 8))


def test_channels_share_level_weights() -> None:
    """One set for each 64 of 128 channels; noise on one of them moves the output."""
    model, ids = tiny.build("mamba", hidden_size=64), tiny.tokens(2, 9)
    report = llcompile.convert(model, ids, verify=False)
    assert [r.weight_sets for r in report.converted] == [2, 2]
    assert "linear, 64 heads share" in str(report)
    levels = model.backbone.layers[0].mixer.loglinear.levels
    assert weights_of(model)["backbone.layers.0.mixer.loglinear.bias"].shape == (2 * levels,)
    run = torch.compile(model, backend="loglinear", options={"inner": "eager"})
    with torch.no_grad():
        before = tiny.logits(run(ids, use_cache=False))
        small.perturb(model)
        assert difference(tiny.logits(run(ids, use_cache=False)), before) > 1e-4


def test_a_checkpoint_holds_them(tmp_path: Any) -> None:
    model, ids = tiny.build("mamba", hidden_size=64), tiny.tokens(2, 9)
    llcompile.convert(model, ids, verify=False)
    small.perturb(model)
    llcompile.save(model, tmp_path / "mamba.safetensors")
    again = tiny.build("mamba", hidden_size=64, seed=1)
    assert llcompile.load(again, tmp_path / "mamba.safetensors") == 2
    held = weights_of(again)
    for name, value in weights_of(model).items():
        assert torch.equal(held[name], value), name
