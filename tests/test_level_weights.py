"""Level weights: exactly one at the start, trainable there, and safe in every way a module is moved or stored."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensorMode

from llcompile.errors import CheckpointError, LevelWeightsError
from llcompile.weights import attachment
from llcompile.weights.level_kinds import KINDS, compute_dtype, level_weights_function, paper_gain
from llcompile.weights.level_weights import LevelWeights

HEADS, LEVELS, WIDTH = 3, 5, 8
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# What training changes first, by kind.
LAST = {"linear": "bias", "static": "logits", "mlp": "bias", "paper": "bias", "routed": "bias"}


def build(kind: str, heads: int = HEADS, levels: int = LEVELS, **more: Any) -> LevelWeights:
    return LevelWeights(kind, heads, levels, WIDTH if KINDS[kind].needs_input else None, **more)


def randomised(kind: str) -> LevelWeights:
    weights = build(kind)
    with torch.no_grad():
        for parameter in weights.parameters():
            parameter.normal_()
    return weights


def wide_input(dtype: torch.dtype = torch.float32) -> Tensor:
    """[2, 7, WIDTH], with entries from tiny to large."""
    return (torch.randn(2, 7, WIDTH) * torch.logspace(-4, 3, WIDTH)).to(dtype)


def bucket_products(query: Tensor, key: Tensor) -> Tensor:
    """<query_t, sum of the keys in bucket l of t>, one pair of tokens after the other."""
    query, key = (t.unflatten(-1, (HEADS, -1)) for t in (query, key))
    scores = torch.zeros(*query.shape[:3], LEVELS)
    for t in range(query.shape[1]):
        for s in range(t + 1):
            level = (t ^ s).bit_length()
            scores[:, t, :, level] += (query[:, t] * key[:, s]).sum(-1)
    return scores


@pytest.mark.parametrize("kind", KINDS)
class TestStart:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("parameters", DTYPES)
    def test_is_exactly_one(self, kind: str, dtype: torch.dtype, parameters: torch.dtype) -> None:
        w = build(kind, dtype=parameters)(wide_input(dtype))
        assert w.shape == (2, 7, HEADS, LEVELS)
        assert w.dtype == (torch.float64 if torch.float64 in (dtype, parameters) else torch.float32)
        assert torch.equal(w, torch.ones_like(w))

    def test_is_exactly_one_under_autocast(self, kind: str) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            w = build(kind)(wide_input())
        assert w.dtype == torch.float32
        assert torch.equal(w, torch.ones_like(w))

    def test_has_a_gradient(self, kind: str) -> None:
        weights = build(kind)
        x = torch.randn(2, 7, WIDTH)
        (weights(x) * torch.randn(2, 7, HEADS, LEVELS)).sum().backward()
        gradients = {name: p.grad for name, p in weights.named_parameters() if p.grad is not None}
        assert all(gradient.isfinite().all() for gradient in gradients.values())
        assert (gradients[LAST[kind]] != 0).all()
        if kind != "static":
            assert (gradients["weight"] != 0).all()

    def test_leaves_the_random_stream_alone(self, kind: str) -> None:
        before = torch.get_rng_state()
        build(kind)
        assert torch.equal(before, torch.get_rng_state())


def test_start_is_exactly_one_through_inductor(fresh_dynamo: None) -> None:
    cases = [(build(kind), dtype) for kind in KINDS for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    inputs = [wide_input(dtype) for _, dtype in cases]

    @torch.compile(fullgraph=True)
    def all_of_them(inputs: list[Tensor]) -> list[Tensor]:
        # Times something, so that the weights are fused into a kernel as they will be in a model.
        return [weights(x) * 3.0 for (weights, _), x in zip(cases, inputs, strict=True)]

    results = all_of_them(inputs)
    for (weights, dtype), w in zip(cases, results, strict=True):
        assert torch.equal(w, torch.full_like(w, 3.0)), f"{weights} with {dtype}"
    torch.stack([w.sum() for w in results]).sum().backward()
    for weights, _ in cases:
        gradient = dict(weights.named_parameters())[LAST[weights.kind]].grad
        assert gradient is not None
        assert (gradient > 0).all()


@pytest.mark.parametrize("kind", KINDS)
class TestFunction:
    def test_matches_its_definition(self, kind: str) -> None:
        weights, x = randomised(kind), torch.randn(2, 7, WIDTH)
        own = dict(weights.tensors())
        if kind == "static":
            z = own["logits"].expand(2, 7, HEADS, LEVELS)
        else:
            hidden = F.silu(x @ own["weight_in"].T + own["bias_in"]) if kind == "mlp" else x
            z = (hidden @ own["weight"].T + own["bias"]).view(2, 7, HEADS, LEVELS)
        if kind == "routed":
            z = z + own["gain"] * own["damping"] * bucket_products(
                (x @ own["query"].T).relu(), (x @ own["key"].T).relu()
            )
        expected = F.softplus(own["level_scale"] * z) / math.log(2) if kind == "paper" else 1 + F.elu(z)
        torch.testing.assert_close(weights(x), expected, rtol=2e-6, atol=2e-6)
        assert (expected >= 0).all()

    def test_gradients(self, kind: str) -> None:
        weights = randomised(kind).double()
        values = [value.detach().requires_grad_() for _, value in weights.tensors()]
        function = level_weights_function(kind, HEADS, LEVELS, torch.float64)
        x = torch.randn(1, 2, WIDTH, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(function, (x, *values))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_can_be_written_into_a_graph(self, kind: str, dtype: torch.dtype) -> None:
        weights, x = randomised(kind), torch.randn(2, 7, WIDTH, dtype=dtype)
        tensors = weights.tensors()
        graph = fx.Graph()
        tracer = fx.proxy.GraphAppendingTracer(graph)
        names = ["x", *(name for name, _ in tensors)]
        proxies = [fx.Proxy(graph.placeholder(name), tracer) for name in names]
        function: Any = level_weights_function(kind, weights.heads, weights.levels, compute_dtype(dtype))
        made = function(*proxies)
        graph.output(made.node)
        graph.lint()
        inlined = fx.GraphModule(nn.Module(), graph)
        assert torch.equal(inlined(x, *(tensor for _, tensor in tensors)), weights(x))

    def test_dynamic_sizes_need_one_graph(self, kind: str, fresh_dynamo: None) -> None:
        weights = randomised(kind)
        counter = CompileCounter()
        compiled = torch.compile(weights, backend=counter, fullgraph=True, dynamic=True)
        for batch, length in ((2, 7), (3, 9), (5, 33)):
            x = torch.randn(batch, length, WIDTH)
            assert torch.equal(compiled(x), weights(x))
        assert counter.frame_count == 1


@pytest.mark.parametrize("kind", KINDS)
class TestIdentity:
    def test_says_what_the_function_does(self, kind: str) -> None:
        weights = build(kind)
        assert weights.is_identity()
        assert weights.is_identity()
        for name, _ in weights.named_parameters():
            changed = build(kind)
            with torch.no_grad():
                dict(changed.named_parameters())[name].view(-1)[1] += 0.5
            w = changed(torch.randn(2, 7, WIDTH))
            assert changed.is_identity() == torch.equal(w, torch.ones_like(w)), name

    def test_sees_every_way_to_change_a_tensor(self, kind: str) -> None:
        weights, trained = build(kind), randomised(kind).state_dict()
        start = {name: value.clone() for name, value in weights.state_dict().items()}
        parameter = dict(weights.named_parameters())[LAST[kind]]
        for _ in range(2):
            with torch.no_grad():
                parameter.add_(1.0)
            assert not weights.is_identity()
            with torch.no_grad():
                parameter.sub_(1.0)
            assert weights.is_identity()
            parameter.data = torch.ones_like(parameter)
            assert not weights.is_identity()
            parameter.data = torch.zeros_like(parameter)
            assert weights.is_identity()
            parameter.data.add_(1.0)  # counts no version
            assert not weights.is_identity()
            weights.load_state_dict(start)
            assert weights.is_identity()
        weights.load_state_dict(trained, assign=True)
        assert not weights.is_identity()
        weights.load_state_dict(start, assign=True)
        assert weights.is_identity()
        setattr(weights, LAST[kind], nn.Parameter(torch.ones_like(parameter)))
        assert not weights.is_identity()
        weights.reset_parameters()
        assert weights.is_identity()

    def test_is_false_for_what_cannot_be_read(self, kind: str) -> None:
        weights = build(kind, device="meta")
        assert not weights.is_identity()
        weights.to_empty(device="cpu").reset_parameters()
        assert weights.is_identity()
        with FakeTensorMode():
            assert not build(kind).is_identity()

    def test_nan_is_no_identity(self, kind: str) -> None:
        weights = build(kind)
        for parameter in weights.parameters():
            with torch.no_grad():
                parameter.view(-1)[0] = math.nan
        assert not weights.is_identity()

    def test_works_on_inference_tensors(self, kind: str) -> None:
        with torch.inference_mode():
            weights = build(kind)
            assert weights.is_identity()
            weights.to(torch.float32)
            dict(weights.named_parameters())[LAST[kind]].add_(1.0)
            assert not weights.is_identity()
        weights.to(torch.float32)


@pytest.mark.parametrize("kind", KINDS)
class TestLife:
    """Everything that people do with modules."""

    def check_same(self, one: LevelWeights, other: LevelWeights) -> None:
        x = torch.randn(2, 7, WIDTH)
        assert torch.equal(one(x), other(x))
        assert repr(one) == repr(other)
        for key, value in one.state_dict().items():
            assert torch.equal(value, other.state_dict()[key]), key

    def test_state_dict(self, kind: str) -> None:
        trained = randomised(kind)
        for assign in (False, True):
            other = build(kind)
            other.load_state_dict(trained.state_dict(), assign=assign)
            self.check_same(trained, other)

    def test_meta_device(self, kind: str) -> None:
        trained, empty = randomised(kind), build(kind, device="meta")
        assert empty(torch.randn(2, 7, WIDTH, device="meta")).shape == (2, 7, HEADS, LEVELS)
        self.check_same(trained, self._loaded(copy.deepcopy(empty), trained, assign=True))
        self.check_same(trained, self._loaded(empty.to_empty(device="cpu"), trained, assign=False))

    def _loaded(self, weights: LevelWeights, source: LevelWeights, assign: bool) -> LevelWeights:
        weights.load_state_dict(source.state_dict(), assign=assign)
        return weights

    def test_to_empty_keeps_the_descriptor(self, kind: str) -> None:
        weights = build(kind)
        expected = weights.descriptor.clone()
        assert torch.equal(weights.to_empty(device="cpu").descriptor, expected)

    def test_copies(self, kind: str) -> None:
        trained = randomised(kind)
        assert not trained.is_identity()  # so that there is something cached
        for other in (copy.deepcopy(trained), pickle.loads(pickle.dumps(trained))):
            self.check_same(trained, other)
            other.reset_parameters()
            assert other.is_identity()
            assert not trained.is_identity()

    def test_casts(self, kind: str) -> None:
        weights = randomised(kind)
        expected = weights.descriptor.clone()
        low = weights.to(torch.bfloat16)
        assert torch.equal(low.descriptor, expected)
        assert low(torch.randn(2, 7, WIDTH, dtype=torch.bfloat16)).dtype == torch.float32

    def test_accepts_a_checkpoint_cast_as_a_whole(self, kind: str) -> None:
        other = build(kind)
        other.load_state_dict({k: v.to(torch.bfloat16) for k, v in randomised(kind).state_dict().items()}, assign=True)
        assert other.descriptor.dtype == torch.int64
        assert not other.is_identity()

    def test_freezing(self, kind: str) -> None:
        weights = build(kind).requires_grad_(False)
        assert not weights(torch.randn(2, 7, WIDTH)).requires_grad
        assert weights.is_identity()

    def test_functional_call(self, kind: str) -> None:
        trained, weights, x = randomised(kind), build(kind), torch.randn(2, 7, WIDTH)
        assert torch.equal(torch.func.functional_call(weights, dict(trained.named_parameters()), (x,)), trained(x))


class Owner(nn.Module):
    """Stands for a mixer in a model."""

    def __init__(self, weights: LevelWeights) -> None:
        super().__init__()
        self.mixer = nn.Module()
        self.mixer.loglinear = weights


OTHERS = [
    ("kind", build("linear"), build("paper"), ["kind='paper'", "kind='linear'"]),
    ("kind, other tensors", build("linear"), build("static"), ["kind='static'", "kind='linear'"]),
    ("heads", build("static"), build("static", heads=4), ["heads=4", "heads=3"]),
    ("levels", build("linear"), build("linear", levels=9), ["levels=9", "levels=5"]),
    ("same count", build("linear", 3, 5), build("linear", 5, 3), ["heads=5", "heads=3"]),
    ("hidden", build("mlp"), build("mlp", hidden=7), ["hidden=7", "hidden=64"]),
    ("input", build("linear"), LevelWeights("linear", HEADS, LEVELS, 9), ["in_features=9", "in_features=8"]),
]


class TestCheckpointOfAnother:
    @pytest.mark.parametrize(("mine", "other", "words"), [row[1:] for row in OTHERS], ids=[row[0] for row in OTHERS])
    @pytest.mark.parametrize("strict", [True, False])
    @pytest.mark.parametrize("assign", [True, False])
    def test_is_refused(
        self, mine: LevelWeights, other: LevelWeights, words: list[str], strict: bool, assign: bool
    ) -> None:
        owner = Owner(copy.deepcopy(mine))
        before = copy.deepcopy(owner.state_dict())
        with pytest.raises(CheckpointError) as caught:
            owner.load_state_dict(Owner(other).state_dict(), strict=strict, assign=assign)
        for word in ("mixer.loglinear", "Convert the model", *words):
            assert word in str(caught.value)
        for key, value in owner.state_dict().items():
            assert torch.equal(value, before[key]), key

    def test_without_a_descriptor_goes_by_shapes(self) -> None:
        owner, other = Owner(build("linear")), Owner(build("linear", levels=9)).state_dict()
        del other["mixer.loglinear.descriptor"]
        with pytest.raises(CheckpointError, match=r"weight \[27, 8\].*weight \[15, 8\]"):
            owner.load_state_dict(other, strict=False)

    def test_of_a_later_layout(self) -> None:
        owner, other = Owner(build("linear")), Owner(build("linear")).state_dict()
        other["mixer.loglinear.descriptor"] = torch.tensor([99, 1])
        with pytest.raises(CheckpointError, match="layout unknown to this version"):
            owner.load_state_dict(other)


class TestPaper:
    @pytest.mark.parametrize("key_dim", [None, 64])
    @pytest.mark.parametrize("with_bias", [True, False])
    def test_published_function(self, key_dim: int | None, with_bias: bool) -> None:
        projection, level_scale = torch.randn(HEADS * LEVELS, WIDTH), torch.randn(HEADS, LEVELS)
        bias = torch.randn(HEADS * LEVELS) if with_bias else None
        x = torch.randn(2, 7, WIDTH)
        made = LevelWeights.from_paper(projection, level_scale, bias, key_dim=key_dim)
        dl = F.linear(x, projection, bias).unflatten(-1, (HEADS, LEVELS))
        expected = F.softplus(level_scale * dl) * (1.0 if key_dim is None else key_dim**0.5)
        torch.testing.assert_close(made(x), expected, rtol=1e-5, atol=1e-5)
        assert not made.is_identity()

    def test_a_published_start_is_no_identity(self) -> None:
        made = LevelWeights.from_paper(torch.zeros(15, WIDTH), torch.ones(3, 5))
        torch.testing.assert_close(made(torch.randn(1, 1, WIDTH)), torch.full((1, 1, 3, 5), math.log(2.0)))
        assert not made.is_identity()

    def test_gain_travels_with_the_checkpoint(self) -> None:
        other = build("paper")
        other.load_state_dict(LevelWeights.from_paper(torch.randn(15, WIDTH), torch.ones(3, 5), key_dim=4).state_dict())
        assert dict(other.tensors())["gain"].item() == pytest.approx(paper_gain(4))

    def test_far_from_zero_is_finite(self) -> None:
        z = torch.tensor([-1e30, -200.0, 200.0, 1e30], requires_grad=True)
        one = torch.ones(1, 1)
        out = level_weights_function("paper", 1, 1)(z.view(1, 4, 1), one, torch.zeros(1), one, torch.tensor(1.0))
        out.sum().backward()
        torch.testing.assert_close(out.flatten() * math.log(2.0), F.softplus(z), rtol=1e-6, atol=1e-6)
        assert z.grad is not None
        torch.testing.assert_close(z.grad * math.log(2.0), torch.tensor([0.0, 0.0, 1.0, 1.0]))

    def test_sizes_that_do_not_fit(self) -> None:
        with pytest.raises(LevelWeightsError, match=r"\[H\*L, D\]"):
            LevelWeights.from_paper(torch.zeros(14, WIDTH), torch.ones(3, 5))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("quadratic", 3, 5, 8), "unknown kind.*linear, static, mlp, paper"),
        (("linear", 0, 5, 8), "at least one head"),
        (("linear", 3, 0, 8), "at least one head"),
        (("linear", 3, 5), "need in_features"),
        (("static", 3, 5, 8), "leave in_features out"),
    ],
)
def test_bad_sizes(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(LevelWeightsError, match=words):
        LevelWeights(*arguments)


def test_hidden_is_for_mlp_only() -> None:
    with pytest.raises(LevelWeightsError, match="hidden=4"):
        LevelWeights("linear", 3, 5, 8, hidden=4)


def test_wrong_input() -> None:
    with pytest.raises(LevelWeightsError, match=r"\[B, T, 8\], got \[2, 7, 9\]"):
        build("linear")(torch.randn(2, 7, 9))


@pytest.mark.parametrize("kind", KINDS)
def test_lives_in_a_transformers_model(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    safetensors = pytest.importorskip("safetensors.torch")
    config = transformers.Mamba2Config(
        vocab_size=32,
        hidden_size=WIDTH,
        num_heads=2,
        head_dim=8,
        expand=2,
        state_size=4,
        num_hidden_layers=1,
        n_groups=1,
    )
    model = transformers.Mamba2ForCausalLM(config)
    attached = randomised(kind)
    model.backbone.layers[0].mixer.loglinear = attached
    model.save_pretrained(tmp_path)

    again, info = transformers.Mamba2ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not [key for key in (*info["missing_keys"], *info["unexpected_keys"]) if "loglinear" in key]
    x = torch.randn(2, 7, WIDTH)
    assert torch.equal(again.backbone.layers[0].mixer.loglinear(x), attached(x))
    again.backbone.layers[0].mixer.loglinear = build(kind)
    state = safetensors.load_file(tmp_path / "model.safetensors")
    missing, unexpected = again.load_state_dict(state, strict=False)
    assert not [key for key in (*missing, *unexpected) if "loglinear" in key]
    assert torch.equal(again.backbone.layers[0].mixer.loglinear(x), attached(x))

    again.backbone.layers[0].mixer.loglinear = build(kind, levels=7)
    with pytest.raises(CheckpointError, match=r"backbone\.layers\.0\.mixer\.loglinear"):
        again.load_state_dict(state, strict=False)


TRANSFORMS = {
    "none": lambda model, x: model(x),
    "grad": lambda model, x: torch.func.grad(lambda z: model(z).sum())(x),
    "grad of parameters": lambda model, x: torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).sum())(
        {name: p.detach() for name, p in model.named_parameters()}
    ),
    "jvp": lambda model, x: torch.func.jvp(model, (x,), (x,)),
    "vmap of an ensemble": lambda model, x: torch.func.vmap(lambda p: torch.func.functional_call(model, p, (x,)))(
        {name: torch.stack([p, p]).detach() for name, p in model.named_parameters()}
    ),
}


@pytest.mark.filterwarnings("ignore::llcompile.errors.LevelWeightsIgnoredWarning")
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_transform_of_torch_func_leaves_nothing(transform: str) -> None:
    """Trained level weights are asked in eager whether they are 1; what the transform showed them dies with it."""
    model = nn.Sequential(nn.Linear(4, 4))
    weights = LevelWeights("linear", 2, 3, 4)
    attachment.attach(model[0], "loglinear", weights)
    with torch.no_grad():
        weights.bias.add_(0.5)
    x = torch.randn(2, 4)
    want = model(x)
    TRANSFORMS[transform](model, x)
    assert torch.equal(model(x), want)
    assert not weights.is_identity()
    weights.reset_parameters()
    assert weights.is_identity()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("kind", KINDS)
def test_stored_in_float8(kind: str, dtype: torch.dtype) -> None:
    """Level weights are computed, and asked whether they are 1, in float32; new ones are never made in float8."""
    weights = LevelWeights(kind, 2, 3, None if kind == "static" else 4).to(dtype)
    assert weights.is_identity()
    w = weights(torch.randn(2, 5, 4).to(dtype))
    assert w.dtype == torch.float32
    assert torch.equal(w, torch.ones(2, 5, 2, 3))
    made = attachment.make(kind, 2, 3, 4, nn.Linear(4, 4).to(dtype))
    assert {p.dtype for p in made.parameters()} == {torch.float32}
    mixed = nn.Sequential(nn.Linear(4, 4).to(dtype), nn.Linear(4, 4).bfloat16())
    assert {p.dtype for p in attachment.make(kind, 2, 3, 4, mixed).parameters()} == {torch.bfloat16}
