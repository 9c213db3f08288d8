"""The backend as torch.compile calls it: modes, precisions, shapes, nesting, options, other backends, strictness."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers.models.mamba2.modeling_mamba2 import mamba2_selective_state_update

import llcompile
import llcompile.errors
from llcompile import backend
from llcompile.errors import LateAttachWarning, OptionError, StrictError
from tests.helpers import small
from tests.helpers.backend import TIGHT, compiled
from tests.helpers.small import difference

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
EAGER = {"inner": "eager"}


def converted(model: nn.Module, tokens: Tensor | None = None, **options: Any) -> nn.Module:
    """Without the run at the end of `convert`: these tests compare the outputs themselves."""
    llcompile.convert(model, small.ids() if tokens is None else tokens, options=options or None, verify=False)
    return model


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


# -- contexts and precisions


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, contextlib.nullcontext])
@pytest.mark.parametrize("training", [False, True])
def test_contexts(context: Any, training: bool) -> None:
    model, ids = small.model().train(training), small.ids()
    with context():
        before = model(ids)
    compile_it = compiled(converted(model))
    with context():
        for _ in range(2):
            after = compile_it(ids)
            assert difference(after, before) < TIGHT
            assert after.requires_grad == before.requires_grad
            assert after.is_inference() == before.is_inference()


def test_one_compiled_model_in_all_contexts() -> None:
    """Level weights were made outside of inference mode, and what was compiled in one context serves the others."""
    model, ids = small.model(), small.ids()
    before = model(ids)
    with torch.inference_mode():
        converted(model)
    run = compiled(model, "aot_eager")
    with torch.inference_mode():
        assert difference(run(ids).clone(), before.detach()) < TIGHT
    with torch.no_grad():
        assert difference(run(ids), before.detach()) < TIGHT
    small.loss(run(ids), ids).backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "loglinear" in n)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_bfloat16_model(inner: str) -> None:
    """In bfloat16 the converted model is no further from the float32 model than the unconverted one."""
    exact = small.model().double()
    model = small.model().to(torch.bfloat16)
    exact.load_state_dict(model.state_dict())
    ids = small.ids()
    expected, before = exact(ids).detach(), model(ids)
    run = compiled(converted(model), inner)
    after = run(ids)
    assert after.dtype == torch.bfloat16
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert difference(after, expected) < 1.5 * difference(before, expected) + 2**-9
    small.loss(after, ids).backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "loglinear" in n)


@pytest.mark.parametrize("inside", [False, True])
def test_bfloat16_autocast(inside: bool) -> None:
    """Autocast around the compiled call, and inside of the compiled region."""
    model, ids = small.model(), small.ids()
    expected = model(ids).detach()

    def autocast(ids: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(ids)

    before = autocast(ids).detach()
    converted(model)
    run = compiled(autocast, "aot_eager") if inside else compiled(model, "aot_eager")
    with contextlib.nullcontext() if inside else torch.autocast("cpu", dtype=torch.bfloat16):
        after = run(ids)
    assert after.dtype == before.dtype
    assert difference(after, expected) < 1.5 * difference(before, expected) + 2**-9
    small.loss(after, ids).backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "loglinear" in n)


def test_convert_under_autocast() -> None:
    model = small.model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        report = llcompile.convert(model, small.ids())
    assert len(report.converted) == 2
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if "loglinear" in n)


# -- shapes


# The operator under aot_eager at all lengths is in tests/kernels/test_torch_operators.py.
@pytest.mark.parametrize("inner", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_one_graph_for_all_lengths(inner: str) -> None:
    model = converted(small.model())
    run = compiled(model, inner, dynamic=True, fullgraph=True)
    small.perturb(model)
    start = graphs()
    for batch, length in ((2, 21), (2, 2), (3, 3), (5, 64), (2, 65), (7, 130), (2, 257)):
        ids = small.ids(batch, length)
        after = run(ids)
        prefix = run(ids[:, : length // 2 + 1].contiguous())  # causal: what comes later has no part in it
        assert difference(after[:, : length // 2 + 1], prefix) < TIGHT
    assert graphs() - start == 1


def test_two_graphs_when_torch_decides() -> None:
    """The first length is compiled as it is, the second makes the graph dynamic, and that is all."""
    model = small.model()
    before = {n: model(small.ids(3, n)).detach() for n in (21, 30, 47, 64, 99, 3)}
    run = compiled(converted(model), fullgraph=True)
    start = graphs()
    for length, expected in before.items():
        assert difference(run(small.ids(3, length)), expected) < TIGHT
    assert graphs() - start <= 2


def test_dynamic_batch() -> None:
    model = small.model()
    before = {n: model(small.ids(n)).detach() for n in (2, 3, 7, 4)}
    run = compiled(converted(model), fullgraph=True)
    start = graphs()
    for batch, expected in before.items():
        assert difference(run(small.ids(batch)), expected) < TIGHT
    assert graphs() - start <= 2


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 2), (2, 1), (1, 64), (1, 65)])
def test_smallest_shapes(batch: int, length: int) -> None:
    model, ids = small.model(), small.ids(batch, length)
    before = model(ids).detach()
    llcompile.convert(model, ids)
    assert difference(compiled(model)(ids), before) < TIGHT


def test_converted_on_one_shape_used_on_another() -> None:
    """The example inputs of convert lend their shapes to nothing."""
    model, ids = small.model(), small.ids(3, 50)
    before = model(ids).detach()
    llcompile.convert(model, small.ids(1, 1), verify=False)
    assert difference(compiled(model)(ids), before) < TIGHT


# -- where the compiled region begins


def test_regional_compilation() -> None:
    model, ids = converted(small.model()), small.ids()
    small.perturb(model)
    whole = compiled(model)(ids).detach()
    torch._dynamo.reset()
    start = graphs()
    for layer in model.layers:
        layer.compile(backend="loglinear", options=EAGER)
    regional = model(ids)
    assert difference(regional, whole) < TIGHT
    assert graphs() - start == 1, "layers of the same kind share one graph"
    small.loss(regional, ids).backward()
    grads = [p.grad for n, p in model.named_parameters() if n.endswith("loglinear.weight")]
    assert len(grads) == 2
    assert all(g is not None and g.any() for g in grads)
    assert not torch.equal(*grads), "each layer has weights of its own, also in a shared graph"


def test_regional_compilation_without_convert() -> None:
    model, ids = small.model(), small.ids()
    before = model(ids).detach()
    for layer in model.layers:
        layer.compile(backend="loglinear", options=EAGER)
    with pytest.warns(LateAttachWarning):
        assert difference(model(ids), before) < TIGHT
    assert sum(n.endswith("loglinear.weight") for n, _ in model.named_parameters()) == 2


@pytest.mark.parametrize("how", ["function", "method"])
def test_mixer_is_the_root(how: str) -> None:
    torch.manual_seed(0)
    mixer, x = small.DeltaMixer(), torch.randn(2, 21, 16)
    before = mixer(x).detach()
    report = llcompile.convert(mixer, x)
    assert [c.parameters for c in report.converted] == [2 * 17 * (16 + 1)]
    if how == "method":
        mixer.compile(backend="loglinear", options=EAGER)
        run: Any = mixer
    else:
        run = compiled(mixer)
    assert difference(run(x), before) < TIGHT
    small.perturb(mixer)
    assert difference(run(x), before) > 1e-3


def test_function_that_closes_over_the_model() -> None:
    model, ids = small.model(), small.ids()
    before = small.loss(model(ids), ids).detach()

    def step(tokens: Tensor) -> Tensor:
        return small.loss(model(tokens), tokens)

    with pytest.warns(LateAttachWarning):
        loss = compiled(step)(ids)
    assert difference(loss, before) < TIGHT
    loss.backward()
    grads = [p.grad for n, p in model.named_parameters() if n.endswith("loglinear.weight")]
    assert len(grads) == 2
    assert all(g is not None and g.any() for g in grads)


GLOBAL: dict[str, nn.Module] = {}
GLOBAL_MODEL: Any = None


def _run_global(tokens: Tensor) -> Tensor:
    return GLOBAL_MODEL(tokens)


def test_global_model() -> None:
    global GLOBAL_MODEL
    GLOBAL_MODEL = small.model()
    before = GLOBAL_MODEL(small.ids()).detach()
    converted(GLOBAL_MODEL)
    run = compiled(_run_global)
    assert difference(run(small.ids()), before) < TIGHT
    small.perturb(GLOBAL_MODEL)
    assert difference(run(small.ids()), before) > 1e-3


def test_model_passed_as_an_argument() -> None:
    model = converted(small.model())
    before = compiled(model)(small.ids()).detach()

    def call(some: nn.Module, tokens: Tensor) -> Tensor:
        return some(tokens)

    run = compiled(call)
    assert difference(run(model, small.ids()), before) < TIGHT
    small.perturb(model)
    assert difference(run(model, small.ids()), before) > 1e-3


def _run_from_container(tokens: Tensor) -> Tensor:
    return GLOBAL["model"](tokens)


def test_model_in_a_container_is_not_changed_silently() -> None:
    """A module that Dynamo reaches through a dictionary: converted, or declined with a reason; never wrong."""
    model = GLOBAL["model"] = small.model()
    before = model(small.ids()).detach()
    converted(model)
    small.perturb(model)
    expected = compiled(model)(small.ids()).detach()
    run = compiled(_run_from_container)
    after = run(small.ids())
    report = backend.last_report()
    if report.declined:
        assert difference(after, before) < TIGHT
        assert all(d.reason and d.hint for d in report.declined)
    else:
        assert difference(after, expected) < TIGHT


def test_two_models_in_one_process() -> None:
    """Same class, other sizes; each keeps its own level weights."""
    ids = small.ids()
    first, second = small.model(), small.model(seed=5, width=24, heads=3, size=5)
    expected = first(ids).detach(), second(ids).detach()
    runs = [compiled(converted(model)) for model in (first, second)]
    for _ in range(2):
        for run, before in zip(runs, expected, strict=True):
            assert difference(run(ids), before) < TIGHT
    small.perturb(second)
    assert difference(runs[0](ids), expected[0]) < TIGHT
    assert difference(runs[1](ids), expected[1]) > 1e-3


def test_same_module_called_twice() -> None:
    torch.manual_seed(0)
    shared = small.DeltaMixer()
    model, ids = small.Model([shared, small.DeltaMixer(), shared]), small.ids()
    before = model(ids).detach()
    report = llcompile.convert(model, ids, verify=False)
    assert sum(n.endswith("loglinear.weight") for n, _ in model.named_parameters()) == 2
    assert report.parameters == sum(p.numel() for n, p in model.named_parameters() if "loglinear" in n)
    run = compiled(model)
    assert difference(run(ids), before) < TIGHT
    small.perturb(model)
    small.loss(run(ids), ids).backward()
    together = shared.loglinear.weight.grad.clone()
    assert together.any()
    # the gradient of both calls: the same as of two modules that hold the same values
    torch._dynamo.reset()
    twin = small.Model([small.DeltaMixer() for _ in range(3)])
    llcompile.convert(twin, ids, verify=False)
    twin.embed.load_state_dict(model.embed.state_dict())
    twin.head.load_state_dict(model.head.state_dict())
    for mine, theirs in zip(twin.layers, model.layers, strict=True):
        mine.load_state_dict(theirs.state_dict())
    small.loss(compiled(twin)(ids), ids).backward()
    apart = twin.layers[0].loglinear.weight.grad + twin.layers[2].loglinear.weight.grad
    assert difference(together, apart) < 1e-4


def test_two_known_functions_in_one_module() -> None:
    torch.manual_seed(0)
    model, ids = small.Model([small.TwoMixers()]), small.ids()
    before = model(ids).detach()
    report = llcompile.convert(model, ids)
    assert {c.family for c in report.converted} == {"Gated DeltaNet", "Mamba-2 (SSD)"}
    assert len(report.converted) == 2
    names = {n for n, _ in model.named_parameters() if "loglinear" in n}
    assert {"layers.0.loglinear.weight", "layers.0.loglinear_2.weight"} <= names
    run = compiled(model, "aot_eager")
    assert difference(run(ids), before) < TIGHT
    small.loss(run(ids), ids).backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "loglinear" in n)
    assert llcompile.revert(model) == 2


class Branching(small.DeltaMixer):
    """A graph break of the user's own, in the middle of the module that owns the mixer."""

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.5
        torch._dynamo.graph_break()
        return super().forward(x)


def test_graph_break_in_the_module() -> None:
    torch.manual_seed(0)
    model, ids = small.Model([Branching(), small.DeltaMixer()]), small.ids()
    before = model(ids).detach()
    report = llcompile.convert(model, ids)
    assert sorted(c.module for c in report.converted) == ["layers.0", "layers.1"]
    assert report.graphs > 1
    run = compiled(model)
    assert difference(run(ids), before) < TIGHT
    small.perturb(model)
    assert difference(run(ids), before) > 1e-3


# -- options


def test_mode_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import compile_fx

    seen: list[dict[str, Any]] = []

    def spy(module: Any, inputs: Any, config_patches: dict[str, Any] | None = None, **_: Any) -> Any:
        seen.append(dict(config_patches or {}))
        return module.forward

    monkeypatch.setattr(compile_fx, "compile_fx", spy)
    model, ids = converted(small.model()), small.ids()
    torch.compile(model, backend="loglinear", mode="max-autotune-no-cudagraphs")(ids)
    torch._dynamo.reset()
    torch.compile(model, backend="loglinear", options={"inductor": {"max_autotune": True}})(ids)
    torch._dynamo.reset()
    torch.compile(model, backend="loglinear", mode="default")(ids)
    expected = torch._inductor.list_mode_options("max-autotune-no-cudagraphs")
    assert seen == [expected, {"max_autotune": True}, {}]
    assert expected


def test_an_unknown_mode_is_an_error() -> None:
    with pytest.raises(Exception, match="reduce-overhead"):  # names the modes that there are
        torch.compile(converted(small.model()), backend="loglinear", mode="quick")(small.ids())


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_inner(inner: str) -> None:
    model, ids = small.model(), small.ids()
    before = model(ids).detach()
    small.loss(model(ids), ids).backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    run = compiled(converted(model), inner)
    after = run(ids)
    assert difference(after, before) < TIGHT
    small.loss(after, ids).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if name in expected:
            assert difference(parameter.grad, expected[name]) < 1e-4, name
        else:
            assert parameter.grad.any(), name


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"level_weight": "linear"}, "did you mean 'level_weights'"),
        ({"inners": "eager"}, "did you mean 'inner'"),
        ({"inner": "inductr"}, "did you mean 'inductor'"),
        ({"level_weights": "liner"}, "did you mean 'linear'"),
        ({"max_autotune": True}, "options={'inductor'"),
        ({"levels": True}, "takes an int, got True of type bool"),
        ({"levels": "17"}, "takes an int"),
        ({"levels": 0}, "between 1 and 64"),
        ({"levels": 65}, "between 1 and 64"),
        ({"strict": 1}, "takes a bool, got 1"),
        ({"inductor": "max_autotune"}, "takes a dict"),
        ({"level_weights": None}, "takes a str"),
        ({1: 2}, "no option 1"),
    ],
)
def test_wrong_options(options: Any, said: str) -> None:
    """Named when torch.compile is called, by the method as well, and the model stays as it is."""
    model = small.model()
    before = dict(model.__dict__)
    with pytest.raises(OptionError) as error:
        torch.compile(model, backend="loglinear", options=options)
    assert said in str(error.value)
    with pytest.raises(OptionError):
        model.compile(backend="loglinear", options=options)
    with pytest.raises(OptionError):
        torch.compile(model, backend=backend.loglinear, options=options)
    with pytest.raises(OptionError):
        llcompile.convert(model, small.ids(), options=options)
    with pytest.raises(OptionError):
        llcompile.inspect(model, small.ids(), options=options)
    assert model.__dict__ == before


def test_other_backends_keep_their_options() -> None:
    """The check of ours has no say in what another backend takes."""
    torch.compile(small.model(), backend="aot_eager", options={"level_weight": 1})
    torch.compile(small.model(), backend="inductor", options={"max_autotune": True})


def test_equal_options_do_not_recompile() -> None:
    model, ids = converted(small.model()), small.ids()
    compiled(model, options={"levels": 17})(ids)
    start = graphs()
    compiled(model, options={"levels": 17})(ids)
    assert graphs() == start


@pytest.mark.parametrize("kind", ["linear", "static", "mlp", "paper", "routed"])
def test_kinds(kind: str) -> None:
    model, ids = small.model(), small.ids()
    before = model(ids).detach()
    options = {"level_weights": kind, "levels": 5}
    report = llcompile.convert(model, ids, options=options, verify=False)
    assert {c.level_weights for c in report.converted} == {kind}
    run = compiled(model, options=options)
    assert difference(run(ids), before) < TIGHT
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if "loglinear" in n], lr=1.0)
    small.loss(run(ids), ids).backward()
    assert any(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "loglinear" in n)
    optimizer.step()
    assert difference(run(ids), before) > 1e-5


def test_few_levels_serve_long_sequences() -> None:
    """With fewer levels than the sequence has, the last weight serves the levels above; none is dropped."""
    model, ids = small.model(), small.ids(2, 100)
    before = model(ids).detach()
    for levels in (1, 3):
        llcompile.revert(model)
        llcompile.convert(model, ids, options={"levels": levels}, verify=False)
        assert difference(compiled(model)(ids), before) < TIGHT


# -- strict


def test_strict_with_nothing_to_convert() -> None:
    torch.manual_seed(0)
    model = small.Model([small.Attention()])
    assert difference(compiled(model, options={"strict": True})(small.ids()), model(small.ids())) < TIGHT
    model = small.Model([torch.nn.Identity()])  # nothing mixes positions: a layer that was meant is not there
    with pytest.raises(StrictError, match="nothing that mixes positions"):
        compiled(model, options={"strict": True})(small.ids())


class Declining(small.DeltaMixer):
    """Calls a known function in a way that is no member of its family: a decay for each value channel."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, *_ = (o[:, 0] for o in self.operands(x))
        state = torch.zeros(*v.shape, k.shape[-1])
        rate, skip = -torch.rand(*v.shape[1:], k.shape[-1]), torch.ones(v.shape[1:])
        out = mamba2_selective_state_update(state, v, v.sigmoid(), rate, k, q, D=skip)
        return x + self.out(out.flatten(-2)).unsqueeze(1)


def test_strict_with_a_declined_mixer() -> None:
    torch.manual_seed(0)
    model, ids = small.Model([small.DeltaMixer(), Declining()]), small.ids()
    before = model(ids).detach()
    with pytest.raises(StrictError, match=r"layers.1: argument dt .*test_backend.py:\d+"):
        compiled(model, options={"strict": True})(ids)
    assert not [n for n, _ in model.named_parameters() if "loglinear" in n], "a refused model stays as it was"
    torch._dynamo.reset()
    with pytest.warns(LateAttachWarning):
        assert difference(compiled(model)(ids), before) < TIGHT
    (declined,) = backend.last_report().declined
    assert (declined.module, declined.where.split(":")[0]) == ("layers.1", __file__)
    assert "varies along V" in declined.reason
    with pytest.raises(StrictError):
        llcompile.convert(model, ids, options={"strict": True})


def test_strict_and_all_is_well() -> None:
    model, ids = small.model(), small.ids()
    converted(model, strict=True)
    compiled(model, options={"strict": True})(ids)


# -- without level weights


def test_linear_operator() -> None:
    model, ids = small.model(), small.ids()
    names, before = list(model.state_dict()), model(ids).detach()
    run = compiled(model, "aot_eager", options={"level_weights": "none"})
    assert difference(run(ids), before) < TIGHT
    assert list(model.state_dict()) == names
    report = llcompile.inspect(model, ids, options={"level_weights": "none"})
    assert [(c.level_weights, c.parameters) for c in report.converted] == [("none", 0)] * 2
    small.loss(run(ids), ids).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_linear_and_log_linear_side_by_side() -> None:
    """Another option is another graph."""
    model, ids = small.model(), small.ids()
    linear = compiled(model, options={"level_weights": "none"})
    before = linear(ids).detach()
    converted(model)
    small.perturb(model)
    log_linear = compiled(model)
    assert difference(log_linear(ids), before) > 1e-3
    with pytest.warns(llcompile.errors.LevelWeightsIgnoredWarning):
        assert difference(linear(ids), before) < TIGHT


# -- other backends


def _capture(module: nn.Module, ids: Tensor) -> tuple[str, Tensor]:
    codes: list[str] = []

    def keep(graph: Any, inputs: Any) -> Any:
        codes.append(graph.code)
        return graph.forward

    out = torch.compile(module, backend=keep)(ids)
    return "\n".join(codes), out


def test_other_backends_see_the_model_as_it_is() -> None:
    model, ids = small.model(), small.ids()
    before = model(ids).detach()
    compiled(small.model())(ids)
    code, out = _capture(model, ids)
    assert "llcompile" not in code
    assert "loglinear" not in code
    assert torch.equal(out, before)
    assert torch.equal(torch.compile(model, backend="eager")(ids), before)
    assert not [n for n, _ in model.named_parameters() if "loglinear" in n]


def test_last_report_and_log(caplog: pytest.LogCaptureFixture) -> None:
    model = converted(small.model())
    with caplog.at_level(logging.INFO, logger="llcompile"):
        compiled(model)(small.ids())
    assert "2 of 2 linear-time mixers are log-linear" in caplog.text
    assert len(backend.last_report().converted) == 2
