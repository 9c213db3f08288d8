"""Level weights on a model's way through life: attached, trained, stored, copied, moved, ignored, removed."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import llcompile
from llcompile.checks.example import Example
from llcompile.errors import (
    CaptureError,
    CheckpointError,
    LateAttachWarning,
    LevelWeightsError,
    LevelWeightsIgnoredWarning,
    LLCompileWarning,
    ModelError,
    OptimizerWarning,
)
from llcompile.weights import attachment
from tests.helpers import small
from tests.helpers.backend import TIGHT, compiled
from tests.helpers.small import difference

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def names_of(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters() if "loglinear" in name]


def weights_of(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if "loglinear" in name]


@contextmanager
def caught(kind: type[Warning] = LLCompileWarning) -> Iterator[list[Warning]]:
    """The warnings of a kind, all of them."""
    found: list[Any] = []
    with warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("always")
        yield found
    found.extend(w.message for w in recorded if issubclass(w.category, kind))


def convert(model: nn.Module, ids: Tensor, **given: Any) -> llcompile.Report:
    """Without the run at the end, of which most of these tests say nothing: they compare, or look at what acts."""
    return llcompile.convert(model, ids, verify=False, **given)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that a call must leave alone: values, structure, hooks, flags."""
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "ids": {name: id(value) for name, value in (*model.named_parameters(), *model.named_buffers())},
        "versions": {name: value._version for name, value in model.named_parameters()},
        "grads": {name: value.grad for name, value in model.named_parameters()},
        "flags": {name: value.requires_grad for name, value in model.named_parameters()},
        "modules": [(name, id(module), module.training) for name, module in model.named_modules()],
        "hooks": [
            (name, key, list(value.items()))
            for name, module in model.named_modules()
            for key, value in vars(module).items()
            if key.endswith("_hooks")
        ],
        "dict": {name: sorted(set(vars(module)) - {"_is_torch_compile"}) for name, module in model.named_modules()},
        "random": torch.get_rng_state().clone(),
    }


def assert_same(after: dict[str, Any], before: dict[str, Any]) -> None:
    after, before = dict(after), dict(before)
    for part in ("state", "random"):
        first, second = after.pop(part), before.pop(part)
        if part == "random":
            assert torch.equal(first, second)
        else:
            assert list(first) == list(second)
            assert all(torch.equal(first[name], second[name]) for name in first)
    assert after == before


# -- attaching


def test_attached_before_the_optimiser() -> None:
    model, ids = small.model(), small.ids()
    before = snapshot(model)
    with caught() as told:
        report = llcompile.convert(model, ids)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        run = compiled(model)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = small.loss(run(ids), ids)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert told == []
    assert losses[2] < losses[0]
    assert report.parameters == sum(p.numel() for p in weights_of(model)) > 0
    assert all(p.any() for p in weights_of(model))
    assert set(model.state_dict()) > set(before["state"])


def test_state_dict_keys() -> None:
    model = small.model()
    own = set(model.state_dict())
    convert(model, small.ids())
    assert set(model.state_dict()) - own == {
        f"layers.{i}.loglinear.{name}" for i in range(2) for name in ("weight", "bias", "descriptor")
    }


def test_attached_at_the_first_call_with_one_warning() -> None:
    model, ids = small.model(), small.ids()
    before = model(ids).detach()
    run = compiled(model)
    with caught() as told:
        assert difference(run(ids), before) < TIGHT
        run(small.ids(3, 40))
        run(small.ids(1, 1))
        with torch.no_grad():
            run(ids)
    assert [type(message) for message in told] == [LateAttachWarning]
    assert "layers.0, layers.1" in str(told[0])
    assert len(names_of(model)) == 4


def test_found_again_not_made_again() -> None:
    """Whether nothing is asked for, what is there, or another kind or number of levels, which is an error."""
    model, ids = small.model(), small.ids()
    first = convert(model, ids)
    small.perturb(model)
    held, values = [id(p) for p in weights_of(model)], [p.clone() for p in weights_of(model)]
    hooks = len(model.layers[0]._forward_hooks)
    there = {"level_weights": model.layers[0].loglinear.kind, "levels": model.layers[0].loglinear.levels}
    with caught() as told:
        second = llcompile.convert(model, ids, options=there)
        compiled(model)(ids)
        compiled(model, options=there)(ids)
        for other in ({"level_weights": "static"}, {"levels": 3}, {"level_weights": "static", "levels": 3}):
            with pytest.raises(LevelWeightsError, match="already has level weights"):
                llcompile.convert(model, ids, options=other)
            with pytest.raises(LevelWeightsError, match="already has level weights"):
                compiled(model, options=other)(ids)
        convert(model, small.ids(1, 90))
    assert told == []
    assert [id(p) for p in weights_of(model)] == held
    assert all(torch.equal(p, v) for p, v in zip(weights_of(model), values, strict=True))
    assert [c.level_weights for c in second.converted] == [c.level_weights for c in first.converted]
    assert len(model.layers[0]._forward_hooks) == hooks


def test_a_taken_name_is_an_error() -> None:
    model = small.model()
    model.layers[1].loglinear = nn.Linear(2, 2)
    before = snapshot(model)
    with pytest.raises(LevelWeightsError, match="'loglinear' of type Linear"):
        llcompile.convert(model, small.ids())
    with pytest.raises(LevelWeightsError, match="'loglinear' of type Linear"):
        compiled(model)(small.ids())
    assert_same(snapshot(model), before)


def test_a_mixer_that_grew_is_an_error() -> None:
    model, ids = small.model(), small.ids()
    convert(model, ids)
    held = model.layers[0].loglinear
    model.layers[0] = small.DeltaMixer(heads=4, size=4)
    attachment.attach(model.layers[0], "loglinear", held)
    with pytest.raises(LevelWeightsError, match=r"made for 2 heads .* needs them for 4"):
        compiled(model)(ids)


# -- values that change under compiled code


def _load_assign(model: nn.Module, state: dict[str, Tensor]) -> None:
    model.load_state_dict(state, assign=True)


def _load(model: nn.Module, state: dict[str, Tensor]) -> None:
    model.load_state_dict(state)


def _set_parameter(model: Any, state: dict[str, Tensor]) -> None:
    for index, layer in enumerate(model.layers):
        for name in ("weight", "bias"):
            setattr(layer.loglinear, name, nn.Parameter(state[f"layers.{index}.loglinear.{name}"].clone()))


def _set_module(model: Any, state: dict[str, Tensor]) -> None:
    for index, layer in enumerate(model.layers):
        fresh = copy.deepcopy(layer.loglinear)
        for name in ("weight", "bias"):
            getattr(fresh, name).data.copy_(state[f"layers.{index}.loglinear.{name}"])
        layer.loglinear = fresh


def _set_data(model: Any, state: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.data = state[name].clone()


CHANGES = (_load, _load_assign, _set_parameter, _set_module, _set_data)
REGIONAL = [pytest.param(change, True, marks=[] if change is _load_assign else pytest.mark.slow) for change in CHANGES]


@pytest.mark.parametrize(("change", "regional"), [*((change, False) for change in CHANGES), *REGIONAL])
def test_new_values_take_effect(change: Callable[[Any, dict[str, Tensor]], None], regional: bool) -> None:
    model, ids = small.model(), small.ids()
    convert(model, ids)
    other = copy.deepcopy(model)
    small.perturb(other)
    run: Any = model if regional else compiled(model)
    if regional:
        for layer in model.layers:
            layer.compile(backend="loglinear", options={"inner": "eager"})
    linear = run(ids).detach()
    change(model, other.state_dict())
    after = run(ids)
    assert difference(after, linear) > 1e-3
    assert difference(after, compiled(other)(ids)) < TIGHT
    small.loss(after, ids).backward()
    assert all(p.grad is not None and p.grad.any() for p in weights_of(model))


def test_another_dtype() -> None:
    model, ids = small.model(), small.ids()
    expected = small.model().double()(ids).detach()
    convert(model, ids)
    run = compiled(model)
    run(ids)
    model.double()
    assert all(p.dtype == torch.float64 for p in model.parameters())
    after = run(ids)
    assert after.dtype == torch.float64
    # the library's function and ours both work in float32 inside
    assert difference(after, expected) < TIGHT
    model.to(torch.float32)
    assert run(ids).dtype == torch.float32


@pytest.mark.parametrize("when", ["converted", "compiled"])
def test_deepcopy(when: str) -> None:
    model, ids = small.model(), small.ids()
    convert(model, ids)
    if when == "compiled":
        model.compile(backend="loglinear", options={"inner": "eager"})
        model(ids)
    twin = copy.deepcopy(model)
    run = compiled(model)
    twin_run = compiled(twin)
    linear = run(ids).detach()
    small.perturb(twin)
    assert all(a is not b for a, b in zip(weights_of(model), weights_of(twin), strict=True))
    assert not any(p.any() for p in weights_of(model))
    assert difference(run(ids), linear) < TIGHT
    with caught() as told:
        assert difference(twin_run(ids), linear) > 1e-3
    assert told == []
    with pytest.warns(LevelWeightsIgnoredWarning):
        torch.nn.Module.__call__(copy.deepcopy(twin), ids) if when == "converted" else twin.forward(ids)
    assert llcompile.revert(twin) == 2
    assert len(weights_of(model)) == 4


def test_freezing() -> None:
    model, ids = small.model(), small.ids()
    convert(model, ids)
    run = compiled(model, "aot_eager")
    for parameter in weights_of(model):
        parameter.requires_grad_(False)
    small.loss(run(ids), ids).backward()
    assert all((p.grad is None) == ("loglinear" in n) for n, p in model.named_parameters())
    model.zero_grad()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("loglinear" in name)
    small.loss(run(ids), ids).backward()
    assert all((p.grad is not None) == ("loglinear" in n) for n, p in model.named_parameters())
    assert all(p.grad.any() for p in weights_of(model) if p.grad is not None)


# -- checkpoints


@pytest.mark.parametrize(
    ("made", "stored"),
    [
        ({"levels": 8}, {"levels": 17}),
        ({"level_weights": "static"}, {"level_weights": "linear"}),
        ({"level_weights": "paper"}, {"level_weights": "linear"}),
    ],
)
def test_a_checkpoint_of_other_level_weights(made: dict[str, Any], stored: dict[str, Any]) -> None:
    ids = small.ids()
    model, other = small.model(), small.model()
    convert(model, ids, options=made)
    convert(other, ids, options=stored)
    small.perturb(other)
    for assign in (False, True):
        with pytest.raises(CheckpointError, match=r"layers.0.loglinear: .*llcompile.convert"):
            model.load_state_dict(other.state_dict(), assign=assign)
    assert difference(compiled(model)(ids), small.model()(ids)) < TIGHT


def test_save_and_load_of_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from tests.models import tiny

    model, ids = tiny.build("mamba2", num_hidden_layers=1), tiny.tokens(2, 19)
    convert(model, ids)
    small.perturb(model)
    with torch.no_grad():
        expected = tiny.logits(compiled(model)(ids))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    report = convert(again, ids)
    assert len(report.converted) == 1
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert difference(tiny.logits(compiled(again)(ids)), expected) < TIGHT
    from safetensors.torch import load_file

    stored = load_file(next(tmp_path.glob("*.safetensors")))
    llcompile.revert(again)
    convert(again, ids)
    again.load_state_dict(stored, strict=False)
    with torch.no_grad():
        assert difference(tiny.logits(compiled(again)(ids)), expected) < TIGHT


# -- optimisers


def test_an_early_optimiser_is_warned_once() -> None:
    model, ids = small.model(), small.ids()
    optimizer = torch.optim.AdamW(model.parameters())
    with caught() as told:
        llcompile.convert(model, ids)
        run = compiled(model)
        for _ in range(3):
            small.loss(run(ids), ids).backward()
            optimizer.step()
    assert [type(message) for message in told] == [OptimizerWarning]
    assert "AdamW" in str(told[0])
    assert "2 converted mixers" in str(told[0])


def test_an_early_optimiser_is_warned_after_a_late_attach() -> None:
    model, ids = small.model(), small.ids()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = compiled(model)
    with caught() as told:
        for _ in range(3):
            small.loss(run(ids), ids).backward()
            optimizer.step()
    assert [type(message) for message in told] == [LateAttachWarning, OptimizerWarning]


@pytest.mark.parametrize(
    "case",
    [
        *("all", "split", "frozen", "group without mixer"),
        *(pytest.param(case, marks=pytest.mark.slow) for case in ("added", "levels only", "other model")),
    ],
)
def test_optimisers_that_need_no_warning(case: str) -> None:
    model, ids = small.model(), small.ids()
    early = torch.optim.SGD(model.parameters(), lr=0.1)
    convert(model, ids)
    new = weights_of(model)
    old = [p for n, p in model.named_parameters() if "loglinear" not in n]
    optimizers = [torch.optim.AdamW(model.parameters())]
    if case == "added":
        early.add_param_group({"params": new})
        optimizers = [early]
    elif case == "split":
        optimizers = [torch.optim.SGD(old, lr=0.1), torch.optim.AdamW(new)]
    elif case == "levels only":
        optimizers = [torch.optim.AdamW(new)]
    elif case == "frozen":
        for parameter in new:
            parameter.requires_grad_(False)
        optimizers = [early]
    elif case == "other model":
        optimizers = [torch.optim.SGD(small.model().parameters(), lr=0.1)]
    elif case == "group without mixer":
        optimizers = [torch.optim.SGD(model.head.parameters(), lr=0.1)]
    with caught() as told:
        small.loss(compiled(model)(ids), ids).backward()
        for optimizer in optimizers:
            optimizer.step()
    assert told == []


# -- never ignored without a word


def ignored(run: Callable[[], Any]) -> int:
    with caught(LevelWeightsIgnoredWarning) as told:
        run()
    return len(told)


@pytest.mark.parametrize("grad", [True, False])
def test_eager_run_warns(grad: bool) -> None:
    model, ids = small.model(), small.ids()
    linear = model(ids).detach()
    llcompile.convert(model, ids)
    with torch.set_grad_enabled(grad):
        assert ignored(lambda: model(ids)) == 0, "weights of 1 may be left out"
        small.perturb(model)
        assert ignored(lambda: model(ids)) > 0
    with pytest.warns(LevelWeightsIgnoredWarning, match="DeltaMixer are no longer 1"):
        assert torch.equal(model(ids), linear)


@pytest.mark.parametrize(
    ("other", "seen_before"),
    [
        *(("eager", False), ("eager", True), ("capture", True), ("aot_eager", False)),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("capture", False), ("aot_eager", True))),
    ],
)
def test_another_backend_warns(other: str, seen_before: bool) -> None:
    """Also a backend that had compiled the model before it was converted."""
    model, ids = small.Model([small.DeltaMixer()]), small.ids()
    name: Any = (lambda graph, inputs: graph.forward) if other == "capture" else other
    run = torch.compile(model, backend=name)
    if seen_before:
        run(ids)
    convert(model, ids)
    small.perturb(model)
    assert ignored(lambda: run(ids)) > 0


def _whole(model: Any) -> Any:
    return compiled(model)


def _method(model: Any) -> Any:
    model.compile(backend="loglinear", options={"inner": "eager"})
    return model


def _regional(model: Any) -> Any:
    for layer in model.layers:
        layer.compile(backend="loglinear", options={"inner": "eager"})
    return model


def _forwards(model: Any) -> Any:
    """Compiled below the modules' own calls, so that the hooks run eagerly and one graph serves both layers."""
    for layer in model.layers:
        layer.forward = compiled(layer.forward)
    return model


WAYS = (_whole, _method, _regional, _forwards)
GRAD = [pytest.param(how, True, marks=[pytest.mark.slow] if how in (_method, _regional) else []) for how in WAYS]


@pytest.mark.parametrize(("how", "grad"), [*((how, False) for how in WAYS), *GRAD])
def test_no_false_alarm(how: Callable[[Any], Any], grad: bool) -> None:
    model, ids = small.model(), small.ids()
    convert(model, ids)
    small.perturb(model)
    expected = compiled(model)(ids).detach()
    torch._dynamo.reset()
    run = how(model)
    with torch.set_grad_enabled(grad):
        for _ in range(3):
            assert ignored(lambda: run(ids)) == 0
        assert difference(run(ids), expected) < TIGHT


def test_no_false_alarm_at_the_root() -> None:
    torch.manual_seed(0)
    mixer, x = small.DeltaMixer(), torch.randn(2, 21, 16)
    convert(mixer, x)
    small.perturb(mixer)
    run = compiled(mixer)
    for _ in range(3):
        assert ignored(lambda: run(x)) == 0
        assert ignored(lambda: mixer(x)) == 1
    mixer.compile(backend="loglinear", options={"inner": "eager"})
    assert ignored(lambda: mixer(x)) == 0


def test_eager_and_compiled_in_turn() -> None:
    model, ids = small.model(), small.ids()
    convert(model, ids)
    run = compiled(model)
    for _ in range(3):
        assert ignored(lambda: run(ids)) == 0
        assert ignored(lambda: model(ids)) == 0
    small.perturb(model)
    for _ in range(3):
        assert ignored(lambda: run(ids)) == 0
        assert ignored(lambda: model(ids)) > 0
        with torch.no_grad():
            assert ignored(lambda: run(ids)) == 0
            assert ignored(lambda: model(ids)) > 0


def test_level_weights_switched_off() -> None:
    model, ids = small.model(), small.ids()
    linear = model(ids).detach()
    convert(model, ids)
    run = compiled(model, options={"level_weights": "none"})
    assert ignored(lambda: run(ids)) == 0
    torch._dynamo.reset()
    small.perturb(model)
    with pytest.warns(LevelWeightsIgnoredWarning, match="switches them off"):
        assert difference(run(ids), linear) < TIGHT


# -- revert


@pytest.mark.parametrize("compiled_first", [False, True])
def test_revert_leaves_nothing(compiled_first: bool) -> None:
    model, ids = small.model(), small.ids()
    before, linear = snapshot(model), model(ids).detach()
    llcompile.convert(model, ids)
    small.perturb(model)
    run = compiled(model)
    if compiled_first:
        run(ids)
    assert llcompile.revert(model) == 2
    assert_same(snapshot(model), before)
    with caught() as told:
        assert torch.equal(model(ids), linear)
        assert torch.equal(torch.compile(model, backend="eager")(ids), linear)
    assert told == []
    assert llcompile.revert(model) == 0
    with pytest.warns(LateAttachWarning):
        assert difference(run(ids), linear) < TIGHT, "compiled code does not hold on to the weights that are gone"


def test_users_own_hooks_stay() -> None:
    model, ids = small.model(), small.ids()
    seen: list[str] = []
    model.layers[0].register_forward_hook(lambda *_: seen.append("after"))
    model.layers[0].register_forward_pre_hook(lambda *_: seen.append("before"))
    before = snapshot(model)
    llcompile.convert(model, ids)
    llcompile.revert(model)
    assert_same(snapshot(model), before)
    seen.clear()
    model(ids)
    assert seen == ["before", "after"]


# -- bad input, and a model that stays as it was


class Counting(small.Model):
    """Changes a buffer, draws random numbers and counts calls."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.dropout = nn.Dropout(0.5)

    def forward(self, ids: Tensor) -> Tensor:
        self.calls += 1
        return self.dropout(super().forward(ids))


@pytest.mark.parametrize("thing", [None, 3, "mamba2", lambda x: x, nn.Linear, [nn.Linear(1, 1)]])
@pytest.mark.parametrize("call", [llcompile.convert, llcompile.inspect, llcompile.revert])
def test_not_a_module(thing: Any, call: Callable[..., Any]) -> None:
    with pytest.raises(ModelError, match=rf"{call.__name__} takes an nn.Module, got {type(thing).__name__}"):
        call(thing)


@pytest.mark.parametrize("call", [llcompile.convert, llcompile.inspect])
@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((), {}),
        ((torch.randn(2, 5),), {}),
        ((torch.full((1, 4), 10_000),), {}),
        (("text",), {}),
        ((small.ids(), small.ids()), {}),
        ((small.ids(),), {"unknown": 1}),
    ],
)
def test_inputs_that_do_not_run(call: Callable[..., Any], args: Any, kwargs: Any) -> None:
    model = Counting().train()
    before = snapshot(model)
    with pytest.raises(CaptureError, match="Counting does not run on the example inputs"):
        call(model, *args, **kwargs)
    assert_same(snapshot(model), before)


class FailingDevice(Counting):
    """Its device fails, and from then on at every call."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nmore")


def test_a_device_that_fails_is_quoted() -> None:
    """Nothing can be said of the model then."""
    with pytest.raises(CaptureError) as caught:
        llcompile.convert(FailingDevice(), small.ids())
    assert "a device failed while FailingDevice ran" in str(caught.value)
    assert "CUDA error: an illegal memory access was encountered. Whether" in str(caught.value)
    assert "does not run on the example inputs" not in str(caught.value)


def test_failing_after_the_mixers() -> None:
    """The level weights that were attached before the model failed are taken off again."""
    model = Counting().train()
    model.head = nn.Linear(7, 7)
    before = snapshot(model)
    with pytest.raises(CaptureError):
        llcompile.convert(model, small.ids())
    assert_same(snapshot(model), before)


def test_nothing_to_convert_under_strict() -> None:
    model = small.Model([small.Attention()])
    before = snapshot(model)
    report = llcompile.convert(model, small.ids(), options={"strict": True})
    assert [(u.module, u.kind) for u in report.untouched] == [("layers.0", "softmax attention (1 head)")]
    assert_same(snapshot(model), before)


def test_convert_changes_nothing_else() -> None:
    model = Counting().train()
    model.embed.weight.requires_grad_(False)
    before = snapshot(model)
    llcompile.convert(model, small.ids())
    assert llcompile.revert(model) == 2
    assert_same(snapshot(model), before)


# -- inspect


def without_run(report: llcompile.Report) -> dict[str, Any]:
    """What `inspect` can say of what `convert` says: the run at the end is left out."""
    assert report.verified
    return {**report.to_dict(), "certificate": None}


def without_times(look: llcompile.Look) -> dict[str, Any]:
    """All that a look says, but how long it took."""
    return {key: value for key, value in look.to_dict().items() if key != "timings"}


@pytest.mark.parametrize("training", [False, True])
def test_inspect_changes_nothing(training: bool) -> None:
    model = Counting().train(training)
    before = snapshot(model)
    look = llcompile.inspect(model, small.ids())
    assert_same(snapshot(model), before)
    made = llcompile.convert(model, small.ids())
    assert look.report.to_dict() == without_run(made)
    assert "2 of 2 linear-time mixers" in str(look)


@pytest.mark.parametrize("enabled", [False, True])
def test_the_search_for_garbage_is_as_it_was(enabled: bool) -> None:
    """It rests while a model is traced."""
    seen: list[bool] = []

    def backend(module: Any, inputs: Any) -> Any:
        seen.append(gc.isenabled())
        return module.forward

    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        Example(small.model(), (small.ids(),), {}).trace(backend)
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()
    assert seen == [False]


def test_inspect_a_converted_model() -> None:
    model = small.model()
    made = convert(model, small.ids(), options={"levels": 5})
    before = snapshot(model)
    look = llcompile.inspect(model, small.ids())
    assert look.parameters == made.parameters
    assert_same(snapshot(model), before)


def test_inspect_on_the_meta_device() -> None:
    real = small.model()
    with torch.device("meta"):
        model = small.Model()
    look = llcompile.inspect(model, small.ids().to("meta"))
    assert without_times(look) == without_times(llcompile.inspect(real, small.ids()))
    assert names_of(model) == []


def test_inspect_and_convert_in_bfloat16() -> None:
    model = small.model().to(torch.bfloat16)
    look = llcompile.inspect(model, small.ids())
    assert len(look.converted) == 2
    assert all(c.certificate.dtype in ("float64", "float32") for c in look.converted)
    assert look.report.to_dict() == without_run(llcompile.convert(model, small.ids()))
