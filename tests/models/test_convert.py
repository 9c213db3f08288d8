"""Fourteen model types of transformers, random weights: what converts, what it computes, how it trains and decodes."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import llcompile
from tests.helpers import small
from tests.helpers.small import difference
from tests.models import tiny
from tests.models.converted import BREAKING, compiled, lively, steps, weights_of

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

SCALAR, GATED, KIMI = "Mamba-2 (SSD)", "Gated DeltaNet", "Kimi Delta Attention"
FAMILY = {
    **dict.fromkeys(("mamba2", "bamba", "falcon_h1", "granitemoehybrid", "nemotron_h", "zamba2"), SCALAR),
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "qwen4_exp_text", "olmo_hybrid"), GATED),
    **dict.fromkeys(("kimi_linear", "bailing_hybrid", "glm5_next_text"), KIMI),
}
MLA = "multi-head latent attention (MLA)"
# What else each of them has, as the user's model names it.
UNTOUCHED: dict[str, dict[str, str]] = {
    "mamba2": {},
    "bamba": {"model.layers.1.self_attn": "softmax attention"},
    "falcon_h1": dict.fromkeys(("model.layers.0.self_attn", "model.layers.1.self_attn"), "softmax attention"),
    "granitemoehybrid": {"model.layers.1.self_attn": "softmax attention"},
    "nemotron_h": {"model.layers.2.mixer": "softmax attention"},
    "zamba2": {"model.layers.1.shared_transformer.self_attn": "softmax attention"},
    "qwen3_next": {"model.layers.1.self_attn": "softmax attention"},
    "qwen3_5_text": {"model.layers.1.self_attn": "softmax attention"},
    "qwen3_5_moe_text": {"model.layers.1.self_attn": "softmax attention"},
    "qwen4_exp_text": {"model.layers.1.self_attn": "softmax attention"},
    "olmo_hybrid": {"model.layers.1.self_attn": "softmax attention"},
    "kimi_linear": {"model.layers.1.self_attn": MLA},
    "bailing_hybrid": {"model.layers.1.self_attn": MLA},
    "glm5_next_text": {"model.layers.1.self_attn": MLA},
}
# The quick suite converts a model of each family, and trains Mamba-2 and one that stock torch cannot. The README's
# example, which its own test runs, is Mamba-2 with Inductor.
CONVERTED = ("mamba2", "qwen3_next", "kimi_linear")
TRAINED = ("mamba2", "olmo_hybrid")
SLOW = pytest.mark.slow


def some(names: tuple[str, ...]) -> list[Any]:
    """All types, those that are not named behind the mark of slow tests."""
    return [name if name in names else pytest.param(name, marks=SLOW) for name in tiny.CONFIGS]


def build(name: str, **changes: Any) -> Any:
    return lively(tiny.build(name, **changes))


def convert(model: nn.Module, *args: Any, **given: Any) -> llcompile.Report:
    """Without the run at the end, which traces once or twice more: for tests that compare the outputs themselves."""
    return llcompile.convert(model, *args, verify=False, **given)


def eager(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return tiny.logits(model(ids))


def check_report(name: str, report: llcompile.Report, mixers: int) -> None:
    assert report.declined == ()
    assert len(report.converted) == mixers
    for converted in report.converted:
        assert (converted.origin, converted.family) == ("function", FAMILY[name])
        assert converted.certificate.max_error <= {"float64": 1e-10, "float32": 2e-5}[converted.certificate.dtype]
        assert converted.certificate.draws >= 3
        assert converted.parameters > 0
        assert converted.level_weights == "linear"
        assert converted.module.startswith(("model.", "backbone.", "layers."))
        assert ":" in converted.where
        assert "modeling_" in converted.where


def _mechanism(kind: str) -> str:
    """The name without what stands in brackets about heads and windows."""
    return kind if kind.endswith("(MLA)") else kind.split(" (")[0]


@pytest.mark.parametrize("name", some(CONVERTED))
def test_converts_and_computes_the_same(name: str) -> None:
    """Every mixer, with a proof; the rest named; logits as before; with other level weights they are others."""
    model, ids = build(name), tiny.tokens()
    before = eager(model, ids)
    report = llcompile.convert(model, ids)
    check_report(name, report, tiny.MIXERS[name])
    prefix = "" if hasattr(model, "lm_head") or name == "mamba2" else "model."
    assert {prefix + u.module: _mechanism(u.kind) for u in report.untouched} == UNTOUCHED[name]
    assert report.graphs == 1 or name in BREAKING
    assert len({n.rsplit(".", 1)[0] for n in weights_of(model)}) == tiny.MIXERS[name]
    run = compiled(model, fullgraph=name not in BREAKING)
    with torch.no_grad():
        assert difference(tiny.logits(run(ids)), before) < 1e-5
        small.perturb(model)
        assert difference(tiny.logits(run(ids)), before) > 1e-4, "the test would not see a wrong mixer"
    llcompile.revert(model)
    assert torch.equal(eager(model, ids), before)


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_inductor(name: str) -> None:
    model, ids = build(name), tiny.tokens()
    before = eager(model, ids)
    convert(model, ids)
    run = compiled(model, "inductor")
    with torch.no_grad():
        assert difference(tiny.logits(run(ids)), before) < 1e-5


@pytest.mark.parametrize("name", some(TRAINED))
def test_trains(name: str) -> None:
    """Three steps of AdamW in training mode: the loss falls, and every level weight has a gradient from the start."""
    model, ids = build(name).train(), tiny.tokens()
    convert(model, ids)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    run = compiled(model, "aot_eager")
    losses = []
    for step in range(3):
        optimizer.zero_grad()
        loss = small.loss(tiny.logits(run(ids)), ids)
        loss.backward()
        if step == 0:
            for parameter in weights_of(model).values():
                assert parameter.grad is not None
                assert parameter.grad.any()
                assert parameter.grad.isfinite().all()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    assert len(set(losses)) == 3


@pytest.mark.parametrize("name", some(("mamba2",)))
def test_gradients_of_the_model(name: str) -> None:
    """At conversion the model's own parameters get the gradients that they got before."""
    model, ids = build(name), tiny.tokens(2, 37)
    small.loss(tiny.logits(model(ids)), ids).backward()
    before = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    convert(model, ids)
    small.loss(tiny.logits(compiled(model)(ids)), ids).backward()
    scale = max(float(g.abs().max()) for g in before.values())
    for parameter_name, parameter in model.named_parameters():
        if parameter_name in before:
            assert parameter.grad is not None, parameter_name
            worst = float((parameter.grad - before[parameter_name]).abs().max())
            own = float(before[parameter_name].abs().max())
            assert worst <= 1e-3 * own + 1e-5 * scale, parameter_name


# -- prefill and decode


DECODES = [
    (name, kind)
    if kind == "linear" and name in ("mamba2", "qwen3_5_text")  # for "none", see the next test
    else pytest.param(name, kind, marks=SLOW)
    for name in tiny.CONFIGS
    for kind in ("linear", "none")
]


@pytest.mark.parametrize(("name", "level_weights"), DECODES)
def test_prefill_and_decode(name: str, level_weights: str) -> None:
    """With random level weights, decoding keeps the levels of the past; without any it computes the linear model.

    Sparse attention beside the mixers may decode to something else than its full pass (glm5_next of transformers 5.24
    does); there the steps with level weights of 1 are the model's own, and others with others.
    """
    model, ids = build(name), tiny.tokens(2, 24)
    options = {"level_weights": level_weights}
    with torch.no_grad():
        before, own = eager(model, ids), torch.cat(list(steps(model, name, ids, prefill=13)), dim=1)
        convert(model, ids, options=options)
        assert bool(weights_of(model)) == (level_weights != "none")
        run = compiled(model, options=options)
        if difference(own, before) > 1e-3:
            assert name in BREAKING
            assert difference(torch.cat(list(steps(run, name, ids, prefill=13)), dim=1), own) < 2e-5
        small.perturb(model)
        whole = tiny.logits(run(ids))
        assert (difference(whole, before) < 1e-5) == (level_weights == "none")
        parts = torch.cat(list(steps(run, name, ids, prefill=13)), dim=1)
        if difference(own, before) > 1e-3:
            assert (difference(parts, own) < 2e-5) == (level_weights == "none")
        else:
            assert difference(parts, whole) < 2e-5


@pytest.mark.parametrize("name", ["mamba2", pytest.param("qwen3_5_text", marks=SLOW)])
def test_linear_state_is_the_librarys_own(name: str) -> None:
    """level_weights="none": a prefill of ours can be carried on by the model's eager code, and the other way round."""
    model, ids = build(name), tiny.tokens(2, 20)
    key = "cache_params" if name == "mamba2" else "past_key_values"
    run = compiled(model, options={"level_weights": "none"})
    with torch.no_grad():
        expected = list(steps(model, name, ids, 13))
        for first, second in ((run, model), (model, run)):
            out = first(ids[:, :13], use_cache=True)
            for t in range(13, 20):
                out = second(ids[:, t : t + 1], use_cache=True, **{key: out[key]})
                assert difference(tiny.logits(out), expected[t - 12]) < 2e-5


# -- whole models in other settings


@pytest.mark.parametrize("name", some(("mamba2",)))
def test_dynamic_length(name: str) -> None:
    """One graph for all lengths; of a model that breaks, no more than without us.

    The output is the model's own to 1e-5, or to twice what that is from float64 where this is more.
    """
    model = build(name)
    inputs = [tiny.tokens(*shape) for shape in ((2, 37), (3, 40), (2, 65), (4, 18))]
    before, exact = [eager(model, ids) for ids in inputs], [eager(_exact(name), ids) for ids in inputs]
    plain = _graphs_of(torch.compile(model, backend="eager", dynamic=True), inputs)[1]
    convert(model, tiny.tokens())
    results, counts = _graphs_of(compiled(model, dynamic=True), inputs)
    for result, expected, truth in zip(results, before, exact, strict=True):
        assert difference(result, expected) < max(1e-5, 2 * difference(expected, truth))
    assert counts == [1] * 4 or (name in BREAKING and all(a <= b for a, b in zip(counts, plain, strict=True)))


def _exact(name: str) -> nn.Module:
    """The model in float64, with experts one by one: the grouped product does not take it."""
    model = build(name).double()
    model.config._experts_implementation = "eager"
    return model


def _graphs_of(run: Any, inputs: list[Tensor]) -> tuple[list[Tensor], list[int]]:
    """The logits for each, and how many graphs there were after it."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    start, results, counts = counters["stats"]["unique_graphs"], [], []
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=64):
        for ids in inputs:
            results.append(tiny.logits(run(ids)))
            counts.append(counters["stats"]["unique_graphs"] - start)
    return results, counts


@pytest.mark.parametrize("name", some(("mamba2",)))
def test_bfloat16(name: str) -> None:
    """A bfloat16 model, and autocast: no further from the float32 model than the model's own code is."""
    model, ids = build(name), tiny.tokens()
    low = build(name).to(torch.bfloat16)
    model.load_state_dict(low.state_dict())
    exact = eager(model, ids)
    with torch.no_grad():
        theirs = difference(tiny.logits(low(ids)), exact)
        convert(low, ids)
        assert difference(tiny.logits(compiled(low)(ids)), exact) < 2 * theirs + 2**-8
        with torch.autocast("cpu", dtype=torch.bfloat16):
            theirs = difference(tiny.logits(model(ids)), exact)
            convert(model, ids)
            assert difference(tiny.logits(compiled(model)(ids)), exact) < 2 * theirs + 2**-8


@pytest.mark.parametrize("name", some(("mamba2",)))
def test_regional(name: str) -> None:
    model, ids = build(name), tiny.tokens()
    convert(model, ids)
    small.perturb(model)
    with torch.no_grad():
        whole = tiny.logits(compiled(model)(ids))
        layers = next(m for n, m in model.named_modules() if n.endswith("layers") and isinstance(m, nn.ModuleList))
        for layer in layers:
            layer.compile(backend="loglinear", options={"inner": "eager"})
        assert difference(tiny.logits(model(ids)), whole) < 1e-5


# -- other configs


def _mamba(
    draw: random.Random, prefix: str, heads: str, head: str, state: str, groups: str, chunk: str
) -> dict[str, Any]:
    count = draw.choice((1, 2))
    return {
        prefix + heads: count * draw.choice((1, 2, 3)),
        prefix + head: draw.choice((8, 5, 16)),
        prefix + state: draw.choice((3, 8, 17)),
        prefix + groups: count,
        prefix + chunk: draw.choice((1, 8, 64, 256)),
    }


def _draw_mamba2(draw: random.Random) -> dict[str, Any]:
    sizes = _mamba(draw, "", "num_heads", "head_dim", "state_size", "n_groups", "chunk_size")
    # The model insists on hidden_size * expand = num_heads * head_dim.
    flags = {key: draw.random() < 0.5 for key in ("use_bias", "use_conv_bias", "rms_norm", "residual_in_fp32")}
    limit = {"time_step_limit": draw.choice(((0.0, float("inf")), (0.1, 0.6)))}
    return {**sizes, **flags, **limit, "expand": 1, "hidden_size": sizes["num_heads"] * sizes["head_dim"]}


def _draw_bamba(draw: random.Random) -> dict[str, Any]:
    sizes = _mamba(draw, "mamba_", "n_heads", "d_head", "d_state", "n_groups", "chunk_size")
    width = sizes["mamba_n_heads"] * sizes["mamba_d_head"]
    sizes["mamba_d_head"] = sizes["mamba_d_head"] + (-width) % 4
    width = sizes["mamba_n_heads"] * sizes["mamba_d_head"]
    flags = {key: draw.random() < 0.5 for key in ("mamba_proj_bias", "mamba_conv_bias")}
    return {**sizes, **flags, "mamba_expand": 1, "hidden_size": width * 4, "mamba_d_head": sizes["mamba_d_head"] * 4}


def _draw_nemotron(draw: random.Random) -> dict[str, Any]:
    sizes = _mamba(draw, "", "mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups", "chunk_size")
    return {**sizes, **{key: draw.random() < 0.5 for key in ("use_bias", "use_conv_bias")}}


def _draw_delta(draw: random.Random) -> dict[str, Any]:
    groups = draw.choice((1, 2, 3))
    return {
        "linear_num_key_heads": groups,
        "linear_num_value_heads": groups * draw.choice((1, 2)),
        "linear_key_head_dim": draw.choice((4, 7, 16)),
        "linear_value_head_dim": draw.choice((4, 9, 16)),
        "linear_conv_kernel_dim": draw.choice((2, 4)),
    }


def _draw_olmo(draw: random.Random) -> dict[str, Any]:
    sizes = _draw_delta(draw)
    return {
        **sizes,
        "linear_num_value_heads": sizes["linear_num_key_heads"],
        "linear_allow_neg_eigval": draw.random() < 0.5,
    }


def _draw_kimi(draw: random.Random) -> dict[str, Any]:
    return {"linear_head_dim": draw.choice((4, 9, 16)), "linear_num_heads": draw.choice((1, 3, 4))}


DRAWS = {
    "mamba2": _draw_mamba2,
    "bamba": _draw_bamba,
    "nemotron_h": _draw_nemotron,
    "qwen3_next": _draw_delta,
    "qwen3_5_text": _draw_delta,
    "olmo_hybrid": _draw_olmo,
    "kimi_linear": _draw_kimi,
    "glm5_next_text": _draw_kimi,
}
QUICK_DRAWS = (("mamba2", 0),)
ALL_DRAWS = [
    (name, seed) if (name, seed) in QUICK_DRAWS else pytest.param(name, seed, marks=SLOW)
    for name in DRAWS
    for seed in range(4)
]


@pytest.mark.parametrize(("name", "seed"), ALL_DRAWS)
def test_other_sizes(name: str, seed: int) -> None:
    draw = random.Random(f"{name} {seed}")
    config = DRAWS[name](draw)
    model = tiny.build(name, seed=seed, **config)
    shapes = [(1, 1), (draw.choice((1, 2)), draw.choice((2, 3, 7))), (1, draw.choice((64, 65, 130)))]
    before = [eager(model, tiny.tokens(*shape, seed=seed)) for shape in shapes]
    report = convert(model, tiny.tokens(*draw.choice(shapes)))
    check_report(name, report, tiny.MIXERS[name])
    run = compiled(model)
    with torch.no_grad():
        for shape, expected in zip(shapes, before, strict=True):
            after = tiny.logits(run(tiny.tokens(*shape, seed=seed)))
            assert difference(after, expected) < 1e-5, (config, shape)
        # With larger weights the library's own rounding shows (gated delta, 130 tokens, heads of 4: it is 2.0e-5 from
        # the result in float64, and ours is 2.0e-6).
        lively(model)
        for shape in shapes:
            ids = tiny.tokens(*shape, seed=seed)
            after = tiny.logits(run(ids))
            assert difference(after, tiny.logits(model(ids))) < 5e-5, (config, shape)


@pytest.mark.slow
def test_inductor_trains_at_any_length() -> None:
    """What is kept for the backward pass has no layout that Inductor cannot tell at a symbolic length."""
    model, ids = build("mamba2").train(), tiny.tokens()
    convert(model, ids)
    run = torch.compile(model, backend="loglinear", dynamic=True)
    for length in (37, 27):
        run(ids[:, :length], labels=ids[:, :length], use_cache=False).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in weights_of(model).values())
