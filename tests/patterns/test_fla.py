"""The rows of FLA: their signatures, their proofs, and FLA's own layers.

FLA is not part of the development environment, because transformers binds to it wherever it can be imported. The slow
test at the end installs it into a folder of its own and runs this file with it; by hand:

    pip install --no-deps --target DIR fla-core==0.6.0 flash-linear-attention==0.6.0 einops triton
    PYTHONPATH=DIR pytest tests/patterns/test_fla.py
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import llcompile
from llcompile.patterns.known import ENTRIES
from llcompile.patterns.known.arguments import CallRejection, read_call
from llcompile.patterns.known.capture import CapturedFunction
from llcompile.patterns.records import Certificate
from tests.patterns.proofs import SIZES, captured_function, operands, proof

PACKAGES = ("fla-core==0.6.0", "flash-linear-attention==0.6.0", "einops", "triton")
HAS_FLA = importlib.util.find_spec("fla") is not None
needs_fla = pytest.mark.skipif(not HAS_FLA, reason="FLA is not installed; `pytest -m slow` runs this file with it")

FLA_ROWS = {entry.function: entry for entry in ENTRIES if entry.library == "fla"}
# Where FLA defines the functions that its package does not export by the first part of their name.
STEMS = {
    **{f"{kind}_delta_rule": f"generalized_delta_rule.{kind}" for kind in ("dplr", "iplr")},
    **{
        stem: stem
        for stem in (
            *("linear_attn", "retention", "simple_gla", "gla", "gated_delta_rule", "delta_rule", "kda"),
            *("lightning_attn", "rwkv6", "rwkv7", "comba", "gdn2", "gated_delta_product"),
        )
    },
}
GATES = ("g_gamma", "A_log", "dt_bias", "gk")


def fla_leaf(name: str) -> CapturedFunction:
    stem = next(s for s in STEMS if name.endswith(f"_{s}"))
    found = captured_function(FLA_ROWS[name], getattr(importlib.import_module(f"fla.ops.{STEMS[stem]}"), name))
    assert found.problem is None
    return found


def arguments_of(name: str, absent: tuple[str, ...], **more: Any) -> dict[str, Any]:
    given: dict[str, Any] = operands(FLA_ROWS[name], absent)
    if "lightning" in name:
        given.update(layer_idx=1, num_layers=4)
    if "linear_attn" in name:
        given.update(normalize=False)
    if "product" in name:
        given.update(num_householder=1)
    if FLA_ROWS[name].returns_state:
        given.update(output_final_state=True)
    return {**given, **more}


def prove_variant(name: str, absent: tuple[str, ...], weighted: bool = True, **more: Any) -> Certificate:
    result = proof(fla_leaf(name), arguments_of(name, absent, **more), weighted)
    assert isinstance(result, Certificate), result
    assert result.dtype == "float32"  # FLA's naive forms compute in it
    return result


def usual(name: str) -> tuple[str, ...]:
    """The operands that most models leave out."""
    own = "gk" if name == "fused_recurrent_gla" or "dplr" in name else ""
    return tuple(gate for gate in GATES if gate != own)


def test_every_form_has_a_row() -> None:
    forms = {stem: {f.removesuffix(f"_{stem}") for f in FLA_ROWS if f.endswith(f"_{stem}")} for stem in STEMS}
    recurrent = {"chunk", "fused_recurrent"}
    assert forms["linear_attn"] == recurrent | {"fused_chunk"}
    assert forms["retention"] == forms["simple_gla"] == recurrent | {"fused_chunk", "parallel"}
    assert forms["kda"] == forms["gated_delta_rule"] == forms["lightning_attn"] == recurrent
    assert forms["dplr_delta_rule"] == forms["iplr_delta_rule"] == forms["comba"] == forms["gdn2"] == recurrent
    assert forms["rwkv6"] == recurrent
    assert forms["rwkv7"] == recurrent | {"fused_mul_recurrent"}
    assert forms["gated_delta_product"] == {"chunk"}


@needs_fla
@pytest.mark.parametrize("name", FLA_ROWS)
class TestEveryRow:
    @pytest.mark.parametrize("weighted", [True, False])
    def test_without_a_state(self, name: str, weighted: bool) -> None:
        certificate = prove_variant(name, (*usual(name), "initial_state"), weighted)
        assert "fla.ops." in certificate.against

    def test_with_a_linear_state(self, name: str) -> None:
        prove_variant(name, usual(name), weighted=False)

    def test_with_a_level_state(self, name: str) -> None:
        if not FLA_ROWS[name].returns_state:
            pytest.skip("this form has no states")
        state = torch.zeros(SIZES["B"], SIZES["H"], 1 + 8, SIZES["K"], SIZES["V"])
        prove_variant(name, usual(name), initial_state=state)

    def test_with_a_state_that_has_its_values_first(self, name: str) -> None:
        if "state_v_first" not in fla_leaf(name).plain.__code__.co_varnames:
            pytest.skip("this form has one layout only")
        state = torch.zeros(SIZES["B"], SIZES["H"], SIZES["V"], SIZES["K"])
        prove_variant(name, usual(name), weighted=False, state_v_first=True, initial_state=state)

    def test_with_a_scale(self, name: str) -> None:
        prove_variant(name, (*usual(name), "initial_state"), scale=0.3)

    def test_packed_sequences_are_read(self, name: str) -> None:
        if "cu_seqlens" not in fla_leaf(name).plain.__code__.co_varnames:
            pytest.skip("this form has none")
        given = arguments_of(name, usual(name), cu_seqlens=torch.tensor([0, 3, 70]))
        call = read_call(FLA_ROWS[name], fla_leaf(name).plain, given)
        assert FLA_ROWS[name].packed_by(call, "bounds") is given["cu_seqlens"]
        assert isinstance(proof(fla_leaf(name), given), Certificate)


@needs_fla
@pytest.mark.parametrize("form", ["chunk", "fused_recurrent"])
class TestArguments:
    def test_simple_gla_with_constant_decays(self, form: str) -> None:
        prove_variant(f"{form}_simple_gla", ("g",))

    def test_simple_gla_without_decays(self, form: str) -> None:
        prove_variant(f"{form}_simple_gla", ("g", "g_gamma"))

    def test_simple_gla_with_both_decays(self, form: str) -> None:
        with pytest.raises(CallRejection, match="passes both g and g_gamma"):
            proof(fla_leaf(f"{form}_simple_gla"), arguments_of(f"{form}_simple_gla", ()))

    def test_normalised_linear_attention(self, form: str) -> None:
        prove_variant(f"{form}_linear_attn", ("initial_state",), normalize=True, output_final_state=False)

    def test_normalised_linear_attention_with_a_state(self, form: str) -> None:
        name = f"{form}_linear_attn"
        with pytest.raises(CallRejection, match="a pair"):
            proof(fla_leaf(name), arguments_of(name, ("initial_state",), normalize=True))

    @pytest.mark.parametrize("stem", ["delta_rule", "gated_delta_rule", "kda"])
    def test_l2norm_inside(self, form: str, stem: str) -> None:
        prove_variant(f"{form}_{stem}", usual(f"{form}_{stem}"), use_qk_l2norm_in_kernel=True)

    @pytest.mark.parametrize("negative", [True, False])
    @pytest.mark.parametrize("stem", ["gated_delta_rule", "kda"])
    def test_sigmoid_inside(self, form: str, stem: str, negative: bool) -> None:
        more = {"use_beta_sigmoid_in_kernel": True, "allow_neg_eigval": negative}
        prove_variant(f"{form}_{stem}", usual(f"{form}_{stem}"), **more)

    @pytest.mark.parametrize("absent", [(), ("dt_bias",)])
    @pytest.mark.parametrize("stem", ["gated_delta_rule", "kda"])
    def test_gate_inside(self, form: str, stem: str, absent: tuple[str, ...]) -> None:
        prove_variant(f"{form}_{stem}", ("gk", *absent), use_gate_in_kernel=True)

    @pytest.mark.parametrize("absent", [(), ("A_log",), ("A_log", "dt_bias")])
    def test_gate_with_a_lower_bound(self, form: str, absent: tuple[str, ...]) -> None:
        prove_variant(f"{form}_kda", absent, use_gate_in_kernel=True, lower_bound=-2.0)

    def test_gate_without_its_rate(self, form: str) -> None:
        with pytest.raises(CallRejection, match="without A_log or lower_bound"):
            proof(fla_leaf(f"{form}_kda"), arguments_of(f"{form}_kda", ("A_log",), use_gate_in_kernel=True))

    def test_a_gate_that_the_call_ignores_is_not_proved(self, form: str) -> None:
        result = proof(fla_leaf(f"{form}_kda"), arguments_of(f"{form}_kda", ("dt_bias",)))
        assert isinstance(result, str)
        assert "does not depend on A_log" in result


@needs_fla
class TestRecurrentForms:
    @pytest.mark.parametrize("absent", [("A_log", "dt_bias"), ("A_log", "dt_bias", "g")])
    def test_gated_delta_rule_with_a_decay_per_channel(self, absent: tuple[str, ...]) -> None:
        certificate = prove_variant("fused_recurrent_gated_delta_rule", absent)
        assert certificate.against.endswith("naive_recurrent_kda")

    def test_gated_delta_rule_without_decays(self) -> None:
        prove_variant("fused_recurrent_gated_delta_rule", ("A_log", "dt_bias", "g", "gk"))

    def test_delta_rule_without_beta(self) -> None:
        prove_variant("fused_recurrent_delta_rule", ("beta", "initial_state"), use_qk_l2norm_in_kernel=True)

    @pytest.mark.parametrize(
        ("name", "more", "reason"),
        [
            ("fused_recurrent_gla", {"gv": torch.zeros(2, 70, 4, 5)}, "along its value channels"),
            ("fused_recurrent_gla", {"reverse": True}, "from the last token to the first"),
            ("fused_recurrent_retention", {"reverse": True}, "from the last token to the first"),
            ("parallel_retention", {"output_attentions": True}, "matrix of scores"),
            ("chunk_retention", {"head_first": True}, "B, H, T"),
            ("chunk_kda", {"cp_context": object()}, "several processes"),
            ("chunk_kda", {"return_intermediate_states": True}, "states between chunks"),
            ("chunk_kda", {"a_new_argument": 1}, "is set, but is not in the table"),
            ("chunk_gated_delta_rule", {"beta": torch.zeros(2, 70, 4, 5)}, "expected 3 axes"),
            ("chunk_simple_gla", {"v": torch.zeros(2, 70, 8, 5)}, "expected H = 4"),
        ],
    )
    def test_what_is_refused(self, name: str, more: dict[str, Any], reason: str) -> None:
        with pytest.raises(CallRejection, match=reason):
            read_call(FLA_ROWS[name], fla_leaf(name).plain, arguments_of(name, usual(name), **more))


@needs_fla
class TestEraseKeys:
    """What is erased along a key of its own."""

    def test_comba_erases_at_its_keys_where_there_are_no_others(self) -> None:
        prove_variant("chunk_comba", ("p", "initial_state"), p=None)

    def test_comba_without_beta(self) -> None:
        prove_variant("fused_recurrent_comba", ("beta", "initial_state"))

    @pytest.mark.parametrize(
        "name", ["chunk_comba", "fused_recurrent_comba", "chunk_gdn2", "chunk_gated_delta_product"]
    )
    def test_l2norm_inside(self, name: str) -> None:
        prove_variant(name, usual(name), use_qk_l2norm_in_kernel=True)

    @pytest.mark.parametrize(("absent", "more"), [((), {}), (("dt_bias",), {}), (("A_log",), {"lower_bound": -2.0})])
    def test_gate_inside(self, absent: tuple[str, ...], more: dict[str, Any]) -> None:
        prove_variant("chunk_gdn2", absent, use_gate_in_kernel=True, **more)

    def test_a_product_without_decays(self) -> None:
        prove_variant("chunk_gated_delta_product", ("g", "initial_state"), g=None)

    def test_a_product_of_two(self) -> None:
        name = "chunk_gated_delta_product"
        with pytest.raises(CallRejection, match="applies 2 reflections"):
            proof(fla_leaf(name), arguments_of(name, (), num_householder=2))

    def test_a_read_after_the_decay_is_seen(self) -> None:
        """FLA has both forms of Comba; the kernels' is the one that is in the table."""
        leaf, given = fla_leaf("chunk_comba"), arguments_of("chunk_comba", ("initial_state",))
        late = dataclasses.replace(
            leaf.entry.references[0],
            name="fla.ops.comba.naive:naive_recurrent_comba",
            call=leaf.entry.references[0].call,
        )
        leaf.entry = dataclasses.replace(leaf.entry, references=(late,))
        result = proof(leaf, given)
        assert isinstance(result, str)
        assert result.startswith("agrees with fla.ops.comba.naive:naive_recurrent_comba only to")


class GatedNorm(nn.Module):
    """In the place of FLA's fused norms, which are Triton."""

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        x = nn.functional.rms_norm(x, x.shape[-1:])
        return x if gate is None else x * torch.sigmoid(gate)


class NoRotation(nn.Module):
    def forward(self, q: Tensor, k: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        return q, k


WIDTH = 32
COMMON: dict[str, Any] = {"hidden_size": WIDTH, "num_heads": 2, "layer_idx": 0}
LAYERS: dict[str, tuple[str, dict[str, Any], dict[str, nn.Module]]] = {
    "LinearAttention": ("linear_attn", {"feature_map": "elu", "output_norm": "identity"}, {}),
    "MultiScaleRetention": (
        "multiscale_retention",
        {"fuse_norm": False},
        {"g_norm": GatedNorm(), "rotary": NoRotation(), "gate_fn": nn.SiLU()},
    ),
    "GatedLinearAttention": ("gla", {"fuse_norm": False}, {"g_norm": GatedNorm(), "gate_fn": nn.SiLU()}),
    "SimpleGatedLinearAttention": (
        "simple_gla",
        {"use_short_conv": False, "fuse_norm": False},
        {"g_norm": GatedNorm(), "gate_fn": nn.SiLU()},
    ),
    "DeltaNet": ("delta_net", {"use_short_conv": False}, {"o_norm": GatedNorm()}),
    "GatedDeltaNet": (
        "gated_deltanet",
        {"use_short_conv": False, "head_dim": 8, "num_v_heads": 4},
        {"o_norm": GatedNorm()},
    ),
    "Comba": ("comba", {"use_short_conv": False, "head_dim": 8, "num_v_heads": 4}, {"o_norm": GatedNorm()}),
    "GatedDeltaNet2": ("gdn2", {"use_short_conv": False, "head_dim": 8}, {"o_norm": GatedNorm()}),
    "KimiDeltaAttention": ("kda", {"use_short_conv": False, "head_dim": 8, "num_v_heads": 4}, {"o_norm": GatedNorm()}),
}


def make_layer(name: str) -> nn.Module:
    file, own, replaced = LAYERS[name]
    module = importlib.import_module(f"fla.layers.{file}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer: nn.Module = getattr(module, name)(**{**COMMON, **own})
    for part, replacement in replaced.items():
        assert hasattr(layer, part)
        delattr(layer, part)
        setattr(layer, part, replacement)
    return layer


def with_naive_functions(layer: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """What the layer computes when FLA's naive functions stand in for its kernels."""
    module = sys.modules[type(layer).__module__]
    defaults = {"scale": None, "beta": None, "initial_state": None, "output_final_state": False}
    with monkeypatch.context() as patch:
        for name in set(FLA_ROWS) & set(vars(module)):
            _, naive = next(fla_leaf(name).references())
            patch.setattr(module, name, lambda naive=naive, **given: naive(**{**defaults, **given}))
        return layer(x)[0]


@needs_fla
@pytest.mark.parametrize("length", [40, 100])  # at most 64 tokens take the recurrent form, more take the chunked one
@pytest.mark.parametrize("name", LAYERS)
def test_layers_convert_and_run(name: str, length: int, monkeypatch: pytest.MonkeyPatch, fresh_dynamo: None) -> None:
    layer, x = make_layer(name), torch.randn(2, length, WIDTH)
    report = llcompile.convert(layer, x)
    assert [c.origin for c in report.converted] == ["function"], report
    assert not report.declined
    assert report.graphs == 1  # through FLA's @torch.compiler.disable
    compiled = torch.compile(layer, backend="loglinear", options={"inner": "eager"})
    with torch.no_grad():
        expected = with_naive_functions(layer, x, monkeypatch)
        torch.testing.assert_close(compiled(x)[0], expected, atol=1e-5, rtol=1e-4)


@needs_fla
@pytest.mark.parametrize("name", LAYERS)
def test_layers_train(name: str, fresh_dynamo: None) -> None:
    layer, x = make_layer(name), torch.randn(2, 70, WIDTH)
    llcompile.convert(layer, x)
    compiled = torch.compile(layer, backend="loglinear", options={"inner": "aot_eager"})
    compiled(x)[0].square().mean().backward()
    gradients = {n: p.grad for n, p in layer.named_parameters()}
    assert any("loglinear" in n for n in gradients)
    assert all(g is not None and bool(g.isfinite().all()) for g in gradients.values())
    assert all(bool(g.any()) for n, g in gradients.items() if "loglinear" in n and g is not None)


@needs_fla
def test_a_whole_model_is_inspected(fresh_dynamo: None) -> None:
    """FLA's model around its layer, without its norms and MLP, which are Triton: each layer's mixer is found."""
    models = importlib.import_module("fla.models")
    config = models.LinearAttentionConfig(
        hidden_size=WIDTH, num_heads=2, num_hidden_layers=2, vocab_size=64, fuse_norm=False, fuse_swiglu=False,
        fuse_cross_entropy=False, feature_map="elu", use_cache=False,
    )  # fmt: skip
    model = models.LinearAttentionModel(config)
    for block in model.layers:
        block.attn_norm = block.mlp_norm = block.attn.norm = block.mlp = nn.Identity()
    model.norm = nn.Identity()
    report = llcompile.inspect(model, torch.randint(0, 64, (2, 70)))
    assert [c.module for c in report.converted] == ["layers.0.attn", "layers.1.attn"], report


@pytest.mark.slow
@pytest.mark.skipif(HAS_FLA, reason="this is the run with FLA")
def test_with_fla_installed(tmp_path: Path) -> None:
    candidate = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(candidate), *PACKAGES]
    subprocess.run(install, check=True, timeout=1200)
    environment = {**os.environ, "PYTHONPATH": str(candidate)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    print(run.stdout[-6000:])
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert "passed" in run.stdout
