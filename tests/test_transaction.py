"""A look at a model leaves no trace of its example run: whatever a forward keeps is put back, and only that."""

from __future__ import annotations

import copy
import random
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import llcompile
from llcompile.checks.transaction import transaction
from llcompile.errors import CaptureError

KEPT: dict[str, int] = {}


class Lookup(OrderedDict[str, Any]):
    """Makes a value each time it is asked, as transformers' table of activations does."""

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(key)()


TABLE = Lookup(a=nn.SiLU)


class Keeping(nn.Module):
    """A mixer that keeps something of each run, by `keep`."""

    seen: ClassVar[list[int]] = []
    runs = 0

    def __init__(self, keep: Callable[[Keeping, Tensor], Any]) -> None:
        super().__init__()
        self.keep = keep
        self.qkv = nn.Linear(8, 24)
        self.register_buffer("table", torch.zeros(4))
        self.register_buffer("nothing", None)
        self.plain = torch.zeros(4)
        self.log = deque([1])
        self.nested: dict[str, Any] = {"lengths": [3], "set": {1}, "counts": Counter(a=1)}
        self.helper = SimpleNamespace(calls=0)
        self.own = Helper()
        self.frozen = (torch.zeros(2), [0])

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        out = (q @ k.mT).tril() @ v
        self.keep(self, out.detach())
        return out


class Helper:
    """An object of the user's own."""

    __slots__ = ("calls", "last")

    def __init__(self) -> None:
        self.calls = 0
        self.last: Any = None


def _set(owner: Any, **values: Any) -> None:
    for name, value in values.items():
        setattr(owner, name, value)


def _grow(m: Keeping, o: Tensor) -> None:
    m.nested["lengths"].append(o.shape[1])
    m.nested["new"] = o
    m.log.append(2)
    m.nested["set"].add(o.shape[1])
    m.nested["counts"]["a"] += 1


def _names(m: Keeping, o: Tensor) -> None:
    KEPT["runs"] = KEPT.get("runs", 0) + 1
    TABLE["a"](o)


CELL: list[int] = []


def _closure() -> Callable[[Keeping, Tensor], None]:
    runs = []

    def keep(m: Keeping, o: Tensor) -> None:
        runs.append(o.shape[1])
        CELL[:] = runs

    return keep


KEEPS: dict[str, Callable[[Keeping, Tensor], Any]] = {
    "nothing": lambda m, o: None,
    "a buffer in place": lambda m, o: m.table.add_(1),
    "a buffer in place, by .data": lambda m, o: m.table.data.add_(1),
    "a buffer by a new one": lambda m, o: _set(m, table=m.table + 1),
    "a buffer that was None": lambda m, o: _set(m, nothing=o.mean(1)),
    "a new attribute": lambda m, o: _set(m, last=o),
    "a new module": lambda m, o: m.add_module("late", nn.Linear(2, 2)),
    "a plain tensor": lambda m, o: m.plain.copy_(o[0, 0, :4]),
    "a tensor in a tuple": lambda m, o: m.frozen[0].add_(1),
    "a parameter": lambda m, o: m.qkv.weight.data.mul_(0.5),
    "containers in containers": _grow,
    "an object's attribute": lambda m, o: _set(m.helper, calls=m.helper.calls + 1),
    "an object's slot": lambda m, o: _set(m.own, calls=m.own.calls + 1, last=o),
    "an attribute of the class": lambda m, o: _set(type(m), runs=type(m).runs + 1),
    "a list of the class": lambda m, o: m.seen.append(1),
    "a global table": _names,
    "a closure's list": _closure(),
}


def _state(m: Keeping) -> dict[str, Any]:
    """Everything that `KEEPS` writes to, as values."""
    own = {k: v for k, v in vars(m).items() if not k.startswith("_") and k not in ("keep", "own", "helper")}
    tensors = {name: t.tolist() for name, t in m.state_dict().items() if "loglinear" not in name}
    shared = (list(Keeping.seen), Keeping.runs, dict(KEPT), list(CELL), list(dict.keys(TABLE)))
    parts = (sorted(n for n in m._modules if n != "loglinear"), sorted(m._buffers), m.own.calls, m.own.last)
    return copy.deepcopy(
        {"own": repr(own), "tensors": tensors, "shared": shared, "parts": parts, "calls": m.helper.calls}
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("look", [llcompile.inspect, llcompile.convert])
@pytest.mark.parametrize("keep", KEEPS)
def test_a_look_leaves_nothing(keep: str, look: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    model, x = Keeping(KEEPS[keep]), torch.randn(2, 12, 8)
    before, drawn, python = _state(model), torch.get_rng_state(), random.getstate()
    look(model, x)
    assert _state(model) == before
    assert torch.equal(torch.get_rng_state(), drawn)
    assert random.getstate() == python


@pytest.mark.parametrize("keep", [k for k in KEEPS if k != "nothing"])
def test_control_a_plain_run_leaves_something(keep: str) -> None:
    """Each of them changes what `_state` looks at; afterwards it is put back by hand: a transaction."""
    model, x = Keeping(KEEPS[keep]), torch.randn(2, 12, 8)
    before = _state(model)
    with transaction(model, x), torch.no_grad():
        model(x)
        assert _state(model) != before
    assert _state(model) == before


def test_after_a_failure_too() -> None:
    def fail(m: Keeping, o: Tensor) -> None:
        m.table.add_(1)
        m.log.append(3)
        raise KeyError("on the way")

    model, x = Keeping(fail), torch.randn(2, 12, 8)
    before = _state(model)
    with pytest.raises(CaptureError, match="on the way"):
        llcompile.convert(model, x)
    assert _state(model) == before


def test_inputs_that_the_model_changes() -> None:
    """A cache that is handed in, and an input that is scaled in place."""

    def forward(x: Tensor, cache: dict[str, Any]) -> None:
        x.mul_(2)
        cache["past"].append(x)

    model, x, cache = Keeping(KEEPS["nothing"]), torch.ones(2, 3), {"past": [1]}
    with transaction(model, x, cache):
        forward(x, cache)
    assert x.eq(1).all()
    assert cache == {"past": [1]}


def test_what_did_not_change_is_not_written() -> None:
    """The versions of parameters stay (autograd looks at them), and views still share their memory."""
    model, base = Keeping(KEEPS["nothing"]), torch.zeros(6)
    model.first, model.second = base[:4], base[2:].expand(1, 4)
    versions = [p._version for p in model.parameters()]
    with transaction(model):
        model.first.add_(1)
    assert base.eq(0).all()
    assert model.first.data_ptr() == base.data_ptr()
    assert [p._version for p in model.parameters()] == versions


def test_nan_is_put_back_as_it_was() -> None:
    model = Keeping(KEEPS["nothing"])
    model.table.fill_(float("nan"))
    with transaction(model):
        model.table.fill_(0)
    assert model.table.isnan().all()


class Hooking(nn.Module):
    """Hooks its weight in its first forward, as transformers' tensor parallel does for replicated parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.hooked: dict[str, nn.Parameter] = {}
        self.runs: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        if "weight" not in self.hooked:
            self.qkv.weight.register_post_accumulate_grad_hook(lambda p: self.runs.append(1))
            self.hooked["weight"] = self.qkv.weight
        q, k, v = self.qkv(x).chunk(3, -1)
        return (q @ k.mT).tril() @ v


@pytest.mark.parametrize("runs_before", [False, True])
def test_hooks_of_parameters_are_registered_once(fresh_dynamo: None, runs_before: bool) -> None:
    model, x = Hooking(), torch.randn(2, 20, 8)
    if runs_before:
        model(x)
    llcompile.convert(model, x)
    run = torch.compile(model, backend="loglinear", options={"inner": "eager"})
    run(x).square().mean().backward()
    assert model.runs == [1]
