"""A sequence that is spread over processes: all results are those of one process that has it whole."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import llcompile
from llcompile import ops
from llcompile.distributed import context_parallel, loglinear_attention
from llcompile.errors import DistributedError
from llcompile.kernels import choice
from tests.helpers import small
from tests.helpers.processes import together
from tests.kernels.kernel_cases import Operands, operands

Correction = bool | Literal["erase"]
FAMILIES: list[tuple[str | None, Correction]] = [
    (decay, correction) for correction in (False, True, "erase") for decay in (None, "head", "token", "channel", "rate")
]
WITH_TIME = ("q", "k", "v", "level_weights", "log_decay", "beta", "erase_query", "erase_key")
# Even at powers of two; uneven; a process without tokens, and one with a single one.
CUTS = ((16, 16), (5, 32), (0, 21), (20, 1))
CUTS_OF_FOUR = ((16, 16, 16, 16), (3, 17, 0, 29), (1, 1, 40, 7))


def results(x: Operands, shard: slice | None = None, **options: Any) -> dict[str, Tensor]:
    """Output, final state and gradients; of a shard, those of this process."""
    leaves = {n: _leaf(n, t, shard) for n, t in x.items() if t is not None}
    if shard is not None and dist.get_rank():
        leaves.pop("initial_state", None)
    given: dict[str, Any] = {**dict.fromkeys(x), **leaves}
    function = ops.loglinear_attention if shard is None else loglinear_attention
    o, state = function(**given, scale=0.7, return_final_state=True, **options)
    assert state is not None
    upstream = _like(x["v"]) if shard is None else _like(x["v"])[:, shard]
    # On all processes together the gradient of the state is what one process has.
    share = torch.randn(state.shape, dtype=state.dtype, generator=torch.Generator().manual_seed(9))
    share = share if shard is None else share / dist.get_world_size()
    found = torch.autograd.grad([o, state], list(leaves.values()), [upstream.to(o.dtype), share], allow_unused=True)
    grads = {n: d for n, d in zip(leaves, found, strict=True) if d is not None}
    return {"o": o.detach(), "state": state.detach(), **{f"d {n}": d for n, d in grads.items()}}


def _leaf(name: str, x: Tensor, shard: slice | None) -> Tensor:
    cut = shard is not None and name in WITH_TIME and x.dim() > 1
    return (x[:, shard] if cut else x).detach().clone().requires_grad_()


def _like(v: Tensor | None) -> Tensor:
    assert v is not None
    return torch.randn(v.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(8))


def check(rank: int, x: Operands, lengths: Sequence[int], tolerance: float) -> None:
    """This process's results are its part of those of one process."""
    start = sum(lengths[:rank])
    shard = slice(start, start + lengths[rank])
    whole, ours = results(x), results(x, shard)
    for name, actual in ours.items():
        parameter = name.removeprefix("d ")
        expected = whole[name]
        if name == "o" or (parameter in WITH_TIME and expected.dim() > 1):
            expected = expected[:, shard]
        if parameter in ("decay_rate", "log_decay") and expected.dim() < 3:  # shared by all tokens
            actual = actual.clone()
            dist.all_reduce(actual)
        if name == "d initial_state":  # a level without tokens has no gradient that means anything
            there = (x["initial_state"] != 0).flatten(-2).any(-1)[..., None, None]  # type: ignore[union-attr]
            actual, expected = actual * there, expected * there
        error = float((actual - expected).abs().max() / whole[name].abs().max()) if expected.numel() else 0.0
        assert error <= tolerance, f"{name} with shards of {lengths}: {error:.1e}"


def families(
    rank: int, pairs: Sequence[tuple[str | None, Correction]], cuts: Sequence[Sequence[int]], **kind: Any
) -> None:
    for lengths in cuts:
        for decay, correction in pairs:
            x = operands(sum(lengths), decay, correction, batch=1, **kind)
            with choice.use("aten"):
                check(rank, x, lengths, 1e-11)


def reads_the_shards_before(rank: int) -> None:
    """What the first process writes changes what the second one reads, by its level weights."""
    lengths = (9, 8)
    x = operands(17, "token", True, levels=6, batch=1)
    start = sum(lengths[:rank])
    shard = slice(start, start + lengths[rank])
    before = results(x, shard)["o"]
    for name in ("v", "level_weights"):
        changed = x[name].clone()  # type: ignore[union-attr]
        changed[:, 0 if name == "v" else 9 :] *= -1
        after = results({**x, name: changed}, shard)["o"]
        assert torch.equal(before, after) == (rank == 0 and name != "v"), name


def bytes_do_not_grow(rank: int) -> None:
    """A shard twice as long sends the same number of bytes, forward and backward, in as many steps."""
    ranks, sent = dist.get_world_size(), []
    for length in (8, 64, 256):
        x = operands(ranks * length, "token", True, levels=12, batch=1)
        leaves = {n: t[:, rank * length :][:, :length].requires_grad_() for n, t in x.items() if t is not None}
        with context_parallel() as traffic:
            o, _ = ops.loglinear_attention(**{**dict.fromkeys(x), **leaves})
        o.sum().backward()
        sent.append((traffic.summaries, traffic.gradients, traffic.collectives))
    one = 4 * 8 * (5 * 5 + 5 * 3)  # heads, bytes, a transition and one state; see the model of cost
    assert sent == [(2 * one, ranks * one, 3)] * 3, sent  # the backward pass gathers once more


def errors(rank: int) -> None:
    """Every process raises the reason, and the next call works."""
    x = operands(16, "token", levels=6, batch=1)
    mine = {n: t if t is None else t[:, 8 * rank :][:, :8] for n, t in x.items()}
    state = torch.zeros(1, 4, 7, 5, 3, dtype=torch.float64)
    two = {"initial_state": state} if rank else {}
    with pytest.raises(DistributedError, match=r"process 1 of 2 .* initial_state, which only the first"):
        loglinear_attention(**{**mine, **two})
    bounds = {"cu_seqlens": torch.tensor([0, 4, 8])} if rank == 0 else {}
    with pytest.raises(DistributedError, match=r"process 0 of 2 .* different lengths"):
        loglinear_attention(**mine, **bounds)
    other = {"level_weights": x["level_weights"][:, :8, :, :4]} if rank else {}  # type: ignore[index]
    with pytest.raises(DistributedError, match=r"processes 0 and 1 differ in levels: .*levels=6.*levels=4"):
        loglinear_attention(**{**mine, **other})
    with context_parallel(), pytest.raises(DistributedError, match=r"routed level weights .* whole sequence"):
        ops.level_readouts(*torch.randn(2, 1, 8, 2, 4), levels=4)
    check(rank, x, (8, 8), 1e-11)


def compiled(rank: int) -> None:
    """A compiled model, its backward pass outside of the context, is that of one process; uneven shards."""
    torch._dynamo.reset()
    lengths, options = (9, 13), {"inner": "eager"}
    model, tokens = small.model(), small.ids(length=22)
    llcompile.convert(model, tokens, verify=False)
    small.perturb(model)
    whole = torch.compile(model, backend="loglinear", options=options)(tokens)
    upstream = torch.randn(whole.shape, generator=torch.Generator().manual_seed(5))
    whole.backward(upstream)
    expected = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    torch._dynamo.reset()
    shard = slice(0, 9) if rank == 0 else slice(9, 22)
    assert sum(lengths) == 22
    with context_parallel():
        o = torch.compile(model, backend="loglinear", options=options)(tokens[:, shard])
    assert small.difference(o, whole[:, shard]) < 2e-6
    o.backward(upstream[:, shard])
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        assert grad is not None
        dist.all_reduce(grad)
        assert small.difference(grad, expected[name]) < 5e-6, name  # type: ignore[arg-type]


class Shifted(nn.Module):
    """A token shift, as RWKV has it, before a mixer."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer = small.DeltaMixer()

    def forward(self, x: Tensor) -> Tensor:
        return self.mixer(x + torch.nn.functional.pad(x, (0, 0, 1, -1)))


class Convolved(nn.Module):
    """A short causal convolution before a mixer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(16, 16, 4, padding=3, groups=16)
        self.mixer = small.DeltaMixer()

    def forward(self, x: Tensor) -> Tensor:
        return self.mixer(self.conv(x.mT)[..., : x.shape[1]].mT)


class Placed(nn.Module):
    """Positions that the model makes."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer = small.DeltaMixer()

    def forward(self, x: Tensor) -> Tensor:
        return self.mixer(x * torch.arange(x.shape[1])[:, None].cos())


def borders(rank: int) -> None:
    """A convolution reads over the border; what cannot is named, and so is a graph that was compiled without."""
    torch.manual_seed(3)
    x, options = torch.randn(2, 24, 16), {"inner": "eager"}
    mine = x[:, 12 * rank :][:, :12]
    for kind in (Shifted, Placed):
        torch._dynamo.reset()
        model = kind()
        llcompile.convert(model, x, verify=False)
        with context_parallel(), pytest.raises(DistributedError, match=r"reads tokens of other processes.*test_con"):
            torch.compile(model, backend="loglinear", options=options)(mine)
    torch._dynamo.reset()
    model = Convolved()
    llcompile.convert(model, x, verify=False)
    small.perturb(model)
    whole = torch.compile(model, backend="loglinear", options=options)
    expected = whole(x)
    whole(mine)
    with context_parallel(), pytest.raises(DistributedError, match="compiled outside of"):
        whole(mine)
    torch._dynamo.reset()
    expected.square().sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    with context_parallel() as traffic:
        o = torch.compile(model, backend="loglinear", options=options)(mine)
    assert small.difference(o, expected[:, 12 * rank :][:, :12]) < 2e-6
    assert traffic.halos == (1 - rank) * 2 * 16 * 3 * 4
    o.square().sum().backward()
    for name, parameter in model.named_parameters():
        dist.all_reduce(parameter.grad)
        assert small.difference(parameter.grad, grads[name]) < 5e-6, name  # type: ignore[arg-type]


SOME: list[tuple[str | None, Correction]] = [("head", False), ("token", True), ("channel", "erase"), ("rate", False)]


def fast(rank: int) -> None:
    families(rank, SOME, [(5, 18)], levels=4)
    families(rank, SOME[1:2], [(6, 5)], levels=None)
    families(rank, SOME[1:3], [(9, 7)], levels=6, state="level")
    with choice.use("aten"):  # which needs no C++ compiler
        for part in (reads_the_shards_before, bytes_do_not_grow, errors, compiled, borders):
            part(rank)


def test_is_the_whole_sequence() -> None:
    """Two processes: results, gradients, bytes, errors, a compiled model, a convolution."""
    together(fast)


def all_families(rank: int, cuts: Sequence[Sequence[int]]) -> None:
    families(rank, FAMILIES, cuts, levels=8)
    families(rank, FAMILIES, cuts[1:2], levels=None)
    families(rank, FAMILIES, cuts[1:], levels=4, state="level")
    families(rank, FAMILIES, cuts[1:2], levels=8, state="linear")


@pytest.mark.slow
@pytest.mark.parametrize("cuts", [CUTS, CUTS_OF_FOUR], ids=["two", "four"])
def test_all_families(cuts: Sequence[Sequence[int]]) -> None:
    """Every family, with and without levels and initial states, on two and on four processes."""
    together(all_families, cuts, ranks=len(cuts[0]))


def single_precision(rank: int) -> None:
    """float32 loses no more than on one process, by whatever kernels run there."""
    lengths = (21, 43)
    shard = slice(0, 21) if rank == 0 else slice(21, 64)
    for decay, correction in FAMILIES:
        x = operands(64, decay, correction, levels=8, batch=1)
        lower = {n: t if t is None else t.float() for n, t in x.items()}
        truth, alone, ours = results(x), results(lower), results(lower, shard)
        for name in ("o", "d q", "d k", "d v", "d level_weights"):
            scale = truth[name].abs().max()
            error = float((ours[name] - truth[name][:, shard]).abs().max() / scale)
            budget = float((alone[name] - truth[name]).abs().max() / scale)
            assert error <= 1e-6 + 2 * budget, f"{decay}, {correction}, {name}: {error:.1e}, alone {budget:.1e}"
    assert sum(lengths) == 64


def library(rank: int) -> None:
    """A model of a library with convolutions, in Inductor."""
    from tests.models import tiny

    model, tokens = tiny.build("mamba2").train(), tiny.tokens(1, 32)
    llcompile.convert(model, tokens, use_cache=False, verify=False)
    small.perturb(model)
    expected = torch.compile(model, backend="loglinear")(tokens, use_cache=False).logits
    torch._dynamo.reset()
    shard = slice(0, 13) if rank == 0 else slice(13, 32)
    with context_parallel():
        o = torch.compile(model, backend="loglinear")(tokens[:, shard], use_cache=False).logits
    assert small.difference(o, expected[:, shard]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("work", [single_precision, library])
def test_more(work: Any) -> None:
    together(work)


def test_the_model_of_cost_counts_what_is_sent() -> None:
    """The messages of docs/scale.md are those of `bytes_do_not_grow`, which is in float64."""
    from benchmarks.context_parallel import Mixer, row

    for tokens in (16, 128, 512):
        found = row(tokens, 2, Mixer(4, 5, 3, corrected=True, levels=12))
        assert found.states == 1
        assert 2 * found.message == 4 * 8 * (5 * 5 + 5 * 3)
    assert row(11 * 2, 2, Mixer(4, 5, 3, corrected=True)).states > 1


@pytest.mark.slow
def test_the_example_runs() -> None:
    """As its first lines say, on two processes."""
    example = Path(__file__).parents[2] / "examples" / "distributed" / "context_parallel.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(example)]
    environment = {**os.environ, "LLCOMPILE_KERNELS": "aten", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "largest difference" in done.stdout
