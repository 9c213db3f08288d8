"""Converted models in DDP, FSDP1 and FSDP2: trained as on one process, or an error that says in which order to go."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

import llcompile
from llcompile.errors import DistributedError
from tests.helpers import small
from tests.helpers.processes import together

OPTIONS = {"inner": "eager"}
RANKS, STEPS, MICRO_BATCHES = 2, 2, 2


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="loglinear", options=OPTIONS)


def regional(model: nn.Module) -> nn.Module:
    for layer in model.layers:  # type: ignore[union-attr]
        layer.compile(backend="loglinear", options=OPTIONS)
    return model


def unused(model: nn.Module) -> Any:
    model.unused = nn.Linear(2, 2)
    return DistributedDataParallel(regional(model), find_unused_parameters=True)


def unused_around_compiled(model: nn.Module) -> Any:
    model.unused = nn.Linear(2, 2)
    return DistributedDataParallel(compiled(model), find_unused_parameters=True)


def static_graph(model: nn.Module) -> Any:
    return DistributedDataParallel(compiled(model), static_graph=True)


def small_buckets(model: nn.Module) -> Any:
    return compiled(DistributedDataParallel(model, bucket_cap_mb=0.001))


def small_buckets_regional(model: nn.Module) -> Any:
    wrapped = DistributedDataParallel(model, bucket_cap_mb=0.001, gradient_as_bucket_view=True)
    regional(model)
    return wrapped


def fsdp1(model: nn.Module) -> Any:
    policy = ModuleWrapPolicy({small.DeltaMixer})
    return compiled(_fsdp1(model, use_orig_params=True, auto_wrap_policy=policy))


def fsdp1_whole(model: nn.Module) -> Any:
    return _fsdp1(regional(model), use_orig_params=True)


def _fsdp1(model: nn.Module, **options: Any) -> nn.Module:
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **options)


def fsdp2(model: nn.Module, **options: Any) -> nn.Module:
    for layer in model.layers:  # type: ignore[union-attr]
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def fsdp2_whole(model: nn.Module) -> Any:
    return compiled(fully_shard(model, reshard_after_forward=False))


def fsdp2_regional(model: nn.Module) -> Any:
    return regional(fsdp2(model))


HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def fsdp2_half(model: nn.Module) -> Any:
    return compiled(fsdp2(model, mp_policy=HALF))


def train(run: Any, model: nn.Module, tokens: Tensor) -> None:
    """Steps that accumulate gradients; all but the last backward pass of a step without communication."""
    optimizer = torch.optim.SGD(run.parameters(), 0.1)
    for _ in range(STEPS):
        for number, part in enumerate(tokens.chunk(MICRO_BATCHES)):
            last = number == MICRO_BATCHES - 1
            ddp = getattr(run, "_orig_mod", run)
            # DDP itself fails where a static graph begins without communication.
            waiting = isinstance(ddp, DistributedDataParallel) and not ddp.static_graph and not last
            with ddp.no_sync() if waiting else contextlib.nullcontext():
                (small.loss(run(part), part) / MICRO_BATCHES).backward()
        optimizer.step()
        optimizer.zero_grad()


def parameters(run: nn.Module) -> dict[str, Tensor]:
    """All parameters, whole and on this process, by their names without those of wrappers."""
    shards = _is_fsdp1(getattr(run, "_orig_mod", run))
    with FullyShardedDataParallel.summon_full_params(run) if shards else contextlib.nullcontext():
        return {_plain(name): _whole(p).detach().clone() for name, p in run.named_parameters()}


def _plain(name: str) -> str:
    for wrapper in ("_orig_mod.", "_fsdp_wrapped_module.", "module."):
        name = name.replace(wrapper, "")
    return name


def _whole(parameter: Any) -> Tensor:
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def work(rank: int, wraps: Sequence[Callable[..., Any]]) -> None:
    dist._DEFAULT_FIRST_BUCKET_BYTES = 256  # else all of this model is in the first bucket
    tokens = small.ids(batch=RANKS * MICRO_BATCHES)
    # Each process accumulates over its own rows; on one process all rows come at once.
    mine = tokens.chunk(RANKS)[rank]
    converted = small.model()
    llcompile.convert(converted, tokens, verify=False)
    small.perturb(converted)
    alone = copy.deepcopy(converted)
    train(compiled(alone), alone, tokens)
    for wrap in wraps:
        torch._dynamo.reset()
        model = copy.deepcopy(converted)
        run = wrap(model)
        train(run, model, mine)
        check(parameters(run), dict(alone.named_parameters()), dict(converted.named_parameters()), wrap is fsdp2_half)


def check(trained: dict[str, Tensor], alone: dict[str, Any], before: dict[str, Any], half: bool) -> None:
    assert alone.keys() <= trained.keys()
    for name, expected in alone.items():
        # bfloat16 has 8 bits; a gradient of that precision makes a small step.
        torch.testing.assert_close(
            trained[name], expected.detach(), rtol=1e-2 if half else 1e-4, atol=1e-6 + half * 1e-3
        )
        assert "loglinear" not in name or not torch.equal(trained[name], before[name]), f"{name} was not trained"
    flat = torch.cat([p.flatten() for p in trained.values()])
    both = [torch.empty_like(flat) for _ in range(RANKS)]
    dist.all_gather(both, flat)
    assert torch.equal(*both), "the processes' parameters differ"


@pytest.mark.parametrize(
    "wraps",
    [
        pytest.param((small_buckets, unused, fsdp1), marks=pytest.mark.slow),
        pytest.param((unused_around_compiled, static_graph, small_buckets_regional), marks=pytest.mark.slow),
        pytest.param((fsdp1_whole, fsdp2_whole, fsdp2_regional, fsdp2_half), marks=pytest.mark.slow),
    ],
    ids=["some", "ddp", "fsdp"],
)
def test_trained_as_on_one_process(wraps: Any) -> None:
    """After two steps of two micro-batches, parameters are those of one process, and the same on both to the bit."""
    together(work, wraps)


def flat_but_named(model: nn.Module) -> nn.Module:
    return _fsdp1(model, use_orig_params=True)


def _is_fsdp1(model: nn.Module) -> bool:
    return isinstance(model, FullyShardedDataParallel)


def too_early(rank: int, name: str, wraps: Sequence[Callable[[nn.Module], nn.Module]], file: str) -> None:
    tokens = small.ids()
    converted = small.model()
    llcompile.convert(converted, tokens, verify=False)
    if rank == 0:
        llcompile.save_levels(converted, file)
    dist.barrier()
    said = rf"^{name} was applied before.*[12] mixers \((FSDP)?DeltaMixer\)"
    for wrap in wraps:
        for late in (
            # FSDP1 runs its inside with parameters of its own.
            lambda model, inner: llcompile.convert(model, tokens, verify=False),
            lambda model, inner: llcompile.convert(model if _is_fsdp1(model) else inner, tokens, verify=False),
            lambda model, inner: llcompile.load_levels(inner, file),
            lambda model, inner: compiled(model)(tokens),
        ):
            inner = small.model()
            model = wrap(inner)
            modules = list(model.modules())
            with pytest.raises(DistributedError, match=said):
                late(model, inner)
            assert modules == list(model.modules())


def flat_parameters(rank: int) -> None:
    tokens = small.ids()
    converted = small.model()
    llcompile.convert(converted, tokens, verify=False)
    said = r"holds \w+ with use_orig_params=False.*Use fully_shard"
    for model in (small.model(), copy.deepcopy(converted)):
        wrapped = _fsdp1(model)
        with pytest.raises(DistributedError, match=said):
            compiled(wrapped)
        with pytest.raises(DistributedError, match=said):
            wrapped.compile(backend="loglinear", options=OPTIONS)
        with pytest.raises(DistributedError, match=said):
            llcompile.convert(wrapped, tokens)
    layers_compiled = _fsdp1(regional(copy.deepcopy(converted)))
    with pytest.raises(DistributedError, match=said):
        layers_compiled(tokens)
    torch.compile(_fsdp1(small.model()), backend="eager")(tokens)  # no concern of ours


@pytest.mark.parametrize(
    ("name", "wraps"),
    [
        ("DDP", [DistributedDataParallel]),
        pytest.param("FSDP", [flat_but_named, fsdp2], marks=pytest.mark.slow),
    ],
)
def test_wrapped_too_early(name: str, wraps: Any, tmp_path: Path) -> None:
    """Level weights that come after the wrapper would not be reduced; the model is as it was."""
    together(too_early, name, wraps, str(tmp_path / "levels.safetensors"))


def test_flat_parameters() -> None:
    """FSDP1's default is not traced by Dynamo, whatever the order."""
    together(flat_parameters)
