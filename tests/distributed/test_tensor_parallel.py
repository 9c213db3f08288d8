"""Heads that are split over processes: all results are those of one process that has all of them."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module

import llcompile
from llcompile import ops
from llcompile.autoload import dtensor_rules
from llcompile.distributed import LevelWeightsParallel, sharding
from llcompile.errors import DistributedError, LevelWeightsError
from llcompile.kernels import choice
from tests.helpers import small
from tests.helpers.processes import together
from tests.helpers.split import LEVELS, OPTIONS, PLAN, Split, mesh, perturb, whole
from tests.kernels.kernel_cases import Operands, operands


def placed(x: Tensor, placement: Any, on: DeviceMesh) -> Tensor:
    return distribute_tensor(x.detach(), on, [placement], src_data_rank=None)


def by_heads(name: str, x: Tensor) -> Any:
    """One group of queries, and one set of level weights, is for all heads."""
    dim = 0 if name in ("log_decay", "decay_rate") and x.dim() < 3 else 1 if "state" in name else 2
    return Shard(dim) if x.shape[dim] > 1 else Replicate()


def by_rows(name: str, x: Tensor) -> Any:
    return Shard(0) if x.dim() > 2 else Replicate()


def by_values(name: str, x: Tensor) -> Any:
    """The rest follows."""
    return Shard(2) if name == "v" else Replicate()


def results(x: Operands, place: Any = None, on: DeviceMesh | None = None) -> dict[str, Tensor]:
    """Output, final state and gradients, whole; on DTensors where `place` says how they are placed."""

    def leaf(name: str, t: Tensor) -> Tensor:
        return (t.clone() if on is None else placed(t, place(name, t), on)).detach().requires_grad_()

    leaves = {n: leaf(n, t) for n, t in x.items() if t is not None}
    given: dict[str, Any] = {**dict.fromkeys(x), **leaves}
    o, state = ops.loglinear_attention(**given, scale=0.7, return_final_state=True)
    assert state is not None
    upstream = [torch.randn(t.shape, dtype=t.dtype, generator=torch.Generator().manual_seed(1)) for t in (o, state)]
    if on is not None:
        upstream = [placed(u, Replicate(), on) for u in upstream]
    found = torch.autograd.grad([o, state], list(leaves.values()), upstream, allow_unused=True)
    grads = {f"d {n}": d for n, d in zip(leaves, found, strict=True) if d is not None}
    return {n: whole(t).detach() for n, t in {"o": o, "state": state, **grads}.items()}


def rules(rank: int, cases: list[tuple[str | None, Any]]) -> None:
    on = mesh()
    for decay, correction in cases:
        for place, sizes in ((by_heads, {}), (by_rows, {"batch": 3}), (by_values, {"groups": 1})):
            x = operands(19, decay, correction, **sizes)  # type: ignore[arg-type]
            with choice.use("aten"):
                alone, found = results(x), results(x, place, on)
            for name, expected in alone.items():
                error = float((found[name] - expected).abs().max() / expected.abs().max())
                assert error < 1e-12, f"{name} {decay} {correction} {place.__name__}: {error:.1e}"
    reads_its_level_weights(on)
    token(on)
    routed(on)
    refused(on)


def reads_its_level_weights(on: DeviceMesh) -> None:
    """Other level weights of a head change the outputs of that head, wherever it is."""
    x = operands(19, "token", True)
    assert x["level_weights"] is not None
    other = x["level_weights"].clone()
    other[:, :, 3] *= 2
    before, after = results(x, by_heads, on)["o"], results({**x, "level_weights": other}, by_heads, on)["o"]
    assert [torch.equal(before[:, :, h], after[:, :, h]) for h in range(4)] == [True, True, True, False]


def token(on: DeviceMesh) -> None:
    """A decoded token, from the state that a sequence left."""
    x = operands(9, "token", True, batch=2)
    one = {n: t[:, -1] for n, t in x.items() if t is not None}
    _, state = ops.loglinear_attention(**x, return_final_state=True)  # type: ignore[arg-type]
    assert state is not None
    expected = ops.loglinear_attention_step(**one, state=state)  # type: ignore[arg-type]
    spread = {n: placed(t, Shard(1), on) for n, t in {**one, "state": state}.items()}
    for a, b in zip(ops.loglinear_attention_step(**spread), expected, strict=True):  # type: ignore[arg-type]
        assert isinstance(a, DTensor)
        assert a.placements == (Shard(1),)
        torch.testing.assert_close(a.full_tensor(), b, rtol=1e-12, atol=1e-12)


def routed(on: DeviceMesh) -> None:
    """Readouts, with gradients."""
    given = torch.randn(2, 2, 9, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).unbind(0)
    alone = [t.clone().requires_grad_() for t in given]
    spread = [placed(t, Shard(2), on).requires_grad_() for t in given]
    expected, found = (ops.level_readouts(*pair, levels=4)[0] for pair in (alone, spread))
    torch.testing.assert_close(whole(found), expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(found.sum(), spread), torch.autograd.grad(expected.sum(), alone), strict=True):
        torch.testing.assert_close(whole(a), b, rtol=1e-12, atol=1e-12)


def refused(on: DeviceMesh) -> None:
    x = {n: t for n, t in operands(16, "token", True).items() if t is not None}
    spread = {n: placed(t, by_heads(n, t), on) for n, t in x.items()}

    def call(**other: Tensor) -> None:
        ops.loglinear_attention(**{**spread, **other})  # type: ignore[arg-type]

    with pytest.raises(
        DistributedError, match=r"k \[2, 16, 2, 5\] has placement .*shards its tokens.*context_parallel"
    ):
        call(k=placed(x["k"], Shard(1), on))
    with pytest.raises(DistributedError, match=r"beta is sharded over the batch and q over heads"):
        call(beta=placed(x["beta"], Shard(0), on))
    with pytest.raises(DistributedError, match=r"log_decay \[2, 16, 4\] is a plain tensor; all operands must be"):
        call(log_decay=x["log_decay"])
    one = {n: placed(t, by_values(n, t), on) for n, t in operands(16, heads=3, groups=1).items() if t is not None}
    with pytest.raises(DistributedError, match=r"3 heads cannot be sharded over 2 processes \(v \[2, 16, 3, 3\]"):
        ops.loglinear_attention(**one)  # type: ignore[arg-type]
    row = {n: placed(t, Shard(0), on) for n, t in operands(16, batch=1).items() if t is not None}
    bounds = distribute_tensor(torch.tensor([0, 7, 16]), on, [Replicate()], src_data_rank=None)
    with pytest.raises(DistributedError, match=r"q is sharded over the batch .* with cu_seqlens all sequences"):
        ops.loglinear_attention(**row, cu_seqlens=bounds)  # type: ignore[arg-type]


def test_dtensors_over_batch_and_heads() -> None:
    """Outputs, states and gradients on two processes; what the operator cannot shard is refused."""
    together(rules, [("rate", False)])


@pytest.mark.slow
@pytest.mark.parametrize("correction", [False, True, "erase"])
def test_every_family_on_four_processes(correction: Any) -> None:
    def sizes(decay: str | None) -> tuple[str | None, Any]:
        return decay, correction

    together(families, [sizes(decay) for decay in (None, "head", "token", "channel", "rate")], ranks=4)


def families(rank: int, cases: list[tuple[str | None, Any]]) -> None:
    on = mesh()
    for decay, correction in cases:
        x = operands(19, decay, correction, groups=4)
        with choice.use("aten"):
            alone, found = results(x), results(x, by_heads, on)
        for name, expected in alone.items():
            error = float((found[name] - expected).abs().max() / expected.abs().max())
            assert error < 1e-12, f"{name} {decay} {correction}: {error:.1e}"


def test_the_rules_are_for_every_operator() -> None:
    """The names that are registered are those with rules: all operators but `ReplayState`'s and the step in place."""
    assert set(dtensor_rules.OPERATORS) == set(sharding.OPERATORS)
    defined = {name for name in dir(torch.ops.llcompile) if name.startswith(("loglinear", "level"))}
    of_whole_sequences = {f"loglinear_attention_{name}" for name in ("replay", "fold", "step_")}
    assert defined == {*sharding.OPERATORS, *of_whole_sequences}


def test_only_level_weights_take_the_style() -> None:
    """A plan that names another module says so."""
    with pytest.raises(DistributedError, match=r"gives it to a Linear; name them in the plan"):
        LevelWeightsParallel()._apply(nn.Linear(2, 2), None)  # type: ignore[arg-type]


class Written(Split):
    """The same projections around a mixer that is written out."""

    def mixed(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for f in (self.q, self.k, self.v))
        decay = (F.logsigmoid(self.a(x)) + F.logsigmoid(self.b(x))).transpose(1, 2).cumsum(-1)
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        factor = (decay.unsqueeze(-1) - decay.unsqueeze(-2)).masked_fill(future, float("-inf")).exp()
        return (q @ k.transpose(-1, -2) * factor @ v).transpose(1, 2)


def trained(model: nn.Module, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    out = torch.compile(model, backend="loglinear", options=OPTIONS)(tokens)
    small.loss(out, tokens).backward()
    return out.detach(), {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}


def models(rank: int, kind: type[Split], before: bool, options: dict[str, Any]) -> None:
    """A model that is split before or after it is converted computes and learns as on one process."""
    torch.manual_seed(0)
    model, tokens = small.Model([kind()]), small.ids(length=21)
    one = copy.deepcopy(model)
    llcompile.convert(one, tokens, verify=False, options=options)
    linear = one(tokens).detach()
    perturb(one)
    expected, gradients = trained(one, tokens)
    torch._dynamo.reset()
    if before:
        llcompile.convert(model, tokens, verify=False, options=options)
        parallelize_module(model, mesh(), {**PLAN, **LEVELS})
    else:
        parallelize_module(model, mesh(), PLAN)
        report = llcompile.convert(model, tokens, options=options)
        assert report.converted[0].heads == 4
        assert report.verified, report.unverified
    perturb(model)
    out, found = trained(model, tokens)
    assert small.difference(linear, expected) > 1e-3
    assert small.difference(out, expected) < 1e-5
    for name, gradient in gradients.items():
        assert small.difference(found[name], gradient) < 1e-4, name
    state = {n: whole(t) for n, t in model.state_dict().items()}
    one.load_state_dict(state)
    assert small.difference(trained(one, tokens)[0], expected) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "before", "options", "ranks"),
    [
        (Split, False, {}, 2),
        (Split, True, {}, 4),
        (Written, False, {}, 2),
        (Written, True, {"level_weights": "mlp"}, 2),
        (Split, True, {"level_weights": "routed"}, 2),
        (Split, False, {"level_weights": "static"}, 2),
    ],
)
def test_a_split_model(kind: type[Split], before: bool, options: dict[str, Any], ranks: int) -> None:
    together(models, kind, before, options, ranks=ranks)


def mismatches(rank: int) -> None:
    """Plans that split the mixer and not its level weights, or the other way round."""
    tokens = small.ids(length=21)
    for plan, message in (
        (PLAN, r"heads of the mixer .* split over 2 processes, and its level weights, .* are not; put 'layers.0"),
        (LEVELS, r"level weights, .* are split over 2 processes, and each of them has all heads"),
    ):
        torch._dynamo.reset()
        model = small.Model([Split()])
        llcompile.convert(model, tokens, verify=False)
        parallelize_module(model, mesh(), plan)
        with pytest.raises(LevelWeightsError, match=message):
            torch.compile(model, backend="loglinear", options=OPTIONS)(tokens)
    torch._dynamo.reset()
    odd = small.Model([Split(heads=3)])
    llcompile.convert(odd, tokens, verify=False)
    with pytest.raises(LevelWeightsError, match=r"cannot be split over 2 processes"):
        parallelize_module(odd, mesh(), LEVELS)


@pytest.mark.slow
def test_plans_that_do_not_fit() -> None:
    together(mismatches)


@pytest.mark.slow
def test_the_example_runs() -> None:
    """As its first lines say, on two processes."""
    example = Path(__file__).parents[2] / "examples" / "distributed" / "tensor_parallel.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(example)]
    environment = {**os.environ, "LLCOMPILE_KERNELS": "aten", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "of an output that level weights moved by" in done.stdout
