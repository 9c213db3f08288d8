"""Routed level weights: what a weight is worth depends on what its bucket holds, in every way that a mixer is run."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import llcompile
from llcompile.kernels.state import is_level_state
from tests.helpers import small
from tests.helpers.small import difference
from tests.models import tiny
from tests.models.converted import compiled, lively, weights_of
from tests.models.generating import some
from tests.models.padding import padded
from tests.models.serving import greedy, in_parts

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

ROUTED = {"level_weights": "routed", "levels": 9}


def routed(model: nn.Module, *example: Any, perturbed: bool = True) -> nn.Module:
    """Converted, with other level weights than 1."""
    report = llcompile.convert(model, *example, options=ROUTED, verify=False)
    assert {c.level_weights for c in report.converted} == {"routed"}
    if perturbed:
        small.perturb(model, 0.3)
    return model


class Quadratic(nn.Module):
    """Linear attention in two heads of four, as a masked product of all pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def operands(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, T, K]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.operands(x)
        return x + self.out(((q @ k.mT).tril() @ v).transpose(1, 2).flatten(2))


def by_pairs(model: Quadratic, x: Tensor) -> Tensor:
    """What a converted `Quadratic` computes, one pair of tokens after the other."""
    levels: Any = model.loglinear
    own = {name: value.detach() for name, value in levels.tensors()}
    heads, length = levels.heads, x.shape[1]
    split = lambda t: t.unflatten(-1, (heads, -1))  # noqa: E731
    asked, held = split((x @ own["query"].T).relu()), split((x @ own["key"].T).relu())
    level = torch.tensor([[(t ^ s).bit_length() if s <= t else 0 for s in range(length)] for t in range(length)])
    before = torch.ones(length, length, dtype=torch.bool).tril()
    products = torch.einsum("bthr,bshr->bhts", asked, held)
    z = split(x @ own["weight"].T + own["bias"]).transpose(1, 2).clone()  # [B, H, T, L]
    for number in range(levels.levels):
        scores = (products * (before & (level == number))).sum(-1) / math.sqrt(levels.features)
        z[..., number] += own["gain"][:, number, None] * scores
    weights = 1 + torch.nn.functional.elu(z)
    q, k, v = model.operands(x)
    pairs = (q @ k.mT) * before * weights.gather(-1, level.expand(*weights.shape[:2], length, length))
    return x + model.out((pairs @ v).transpose(1, 2).flatten(2))


def test_a_hand_written_mixer_computes_its_definition() -> None:
    model = Quadratic()
    x = torch.randn(2, 27, 8)
    plain = model(x)
    routed(model, x, perturbed=False)
    run = compiled(model, dynamic=True)
    assert difference(run(x), plain) < 1e-6
    small.perturb(model)
    assert difference(run(x), plain) > 1e-2
    for length in (27, 1, 2, 16):  # with one token there is one bucket
        assert difference(run(x[:, :length]), by_pairs(model, x[:, :length])) < 1e-5


@pytest.mark.parametrize("length", [1, 13])
def test_gradients_are_those_of_the_definition(length: int) -> None:
    model, x = Quadratic(), torch.randn(2, 13, 8)
    routed(model, x)
    x = x[:, :length].clone().requires_grad_()
    ours = torch.autograd.grad(compiled(model, "aot_eager")(x).square().sum(), [x, *model.qkv.parameters()])
    theirs = torch.autograd.grad(by_pairs(model, x).square().sum(), [x, *model.qkv.parameters()])
    for actual, expected in zip(ours, theirs, strict=True):
        assert difference(actual, expected) < 1e-4


def test_the_first_steps_reach_every_parameter() -> None:
    """At the start the gain alone has a gradient, of the three that make a score; after one step they all have."""
    model, ids = routed(small.model(), small.ids(), perturbed=False), small.ids()
    run = compiled(model, "aot_eager")
    before = run(ids).detach()
    own = weights_of(model)
    optimizer = torch.optim.SGD(own.values(), lr=1.0)
    for step in range(2):
        optimizer.zero_grad()
        small.loss(run(ids), ids).backward()
        still = {name.rpartition(".")[2] for name, p in own.items() if p.grad is None or not p.grad.any()}
        assert still == ({"query", "key"} if step == 0 else set())
        optimizer.step()
    assert difference(run(ids), before) > 1e-3
    with torch.no_grad():  # the query by itself
        for name, p in own.items():
            p.fill_(1.0 if name.endswith("gain") else 0.0) if not name.endswith("key") else None
        assert difference(run(ids), before) < 1e-5
        for name, p in own.items():
            if name.endswith("query"):
                p.normal_()
        assert difference(run(ids), before) > 1e-3


@pytest.mark.parametrize("name", some(("mamba2", "qwen3_next", "kimi_linear", "mamba"), quick=("mamba2",)))
def test_prefill_and_decode(name: str) -> None:
    """Through the model's own cache, in pieces of any size: as one full pass; `generate()` writes the same."""
    model, ids = routed(lively(tiny.build(name)), tiny.tokens()), tiny.tokens()
    model.compile(backend="loglinear", options={"inner": "eager"})
    with torch.no_grad():
        whole = tiny.logits(model(ids, use_cache=False))
        if name == "mamba":  # its cache takes whole prompts and single tokens
            written = model.generate(ids[:, :13], max_new_tokens=8, do_sample=False, eos_token_id=None)
            assert torch.equal(written, greedy(model, ids[:, :13], 8))
            return
        parts = torch.cat(list(in_parts(model, name, ids, (13, *[1] * 9, ids.shape[1] - 22))), 1)
        assert difference(parts, whole) < 1e-5
        written = model.generate(ids[:, :13], max_new_tokens=8, do_sample=False, eos_token_id=None)
        assert torch.equal(written, greedy(model, ids[:, :13], 8))


def test_a_cache_without_the_key_sums_gives_something_else() -> None:
    """What is kept in the header is read: without it, the next token has other logits."""
    model, ids = routed(lively(tiny.build("mamba2")), tiny.tokens()), tiny.tokens()
    model.compile(backend="loglinear", options={"inner": "eager"})
    with torch.no_grad():
        after = []
        for keep in (True, False):
            cache = model(ids[:, :30], use_cache=True).cache_params
            states = [t for t in states_of(cache) if is_level_state(t)]
            assert len(states) == 2
            for state in states:
                header = state[:, :, 0].flatten(2)
                assert header[..., 8:].any()
                if not keep:
                    state[:, :, 0] = torch.cat([header[..., :8], torch.zeros_like(header[..., 8:])], -1).view_as(
                        state[:, :, 0]
                    )
            after.append(tiny.logits(model(ids[:, 30:31], use_cache=True, cache_params=cache)))
    assert difference(after[1], after[0]) > 1e-3


def states_of(cache: Any) -> list[Tensor]:
    """The recurrent states in a cache of transformers."""
    return [s for layer in cache.layers for s in getattr(layer, "recurrent_states", {}).values() if s is not None]


@pytest.mark.parametrize("name", some(("mamba2", "qwen3_next"), quick=("qwen3_next",)))
def test_padded_rows(name: str) -> None:
    model = routed(lively(tiny.build(name)), tiny.tokens())
    model.compile(backend="loglinear", options={"inner": "eager"})
    with torch.no_grad():
        alone = [tiny.logits(model(row, use_cache=False))[0] for row in padded("left")[2]]
        for side in ("left", "right"):
            ids, mask, _ = padded(side)
            logits = tiny.logits(model(ids, attention_mask=mask, use_cache=False))
            for row, expected in enumerate(alone):
                assert difference(logits[row][mask[row] == 1], expected) < 1e-5, (side, row)


@pytest.mark.slow
def test_inductor_trains_at_all_lengths() -> None:
    """One graph for all lengths, with the gradients of the same graph without Inductor."""
    model = routed(small.model(), small.ids())
    run = compiled(model, "inductor", dynamic=True)
    plain = compiled(model, "eager", dynamic=True)
    for length in (21, 40, 7):
        ids = small.ids(2, length)
        ours, theirs = (torch.autograd.grad(small.loss(f(ids), ids), [*model.parameters()]) for f in (run, plain))
        for actual, expected in zip(ours, theirs, strict=True):
            assert difference(actual, expected) < 1e-4


@pytest.mark.slow
def test_saved_opened_and_exported(tmp_path: Path) -> None:
    """By transformers and by torch.export: the same logits, with the width of the routing queries."""
    model, ids = routed(lively(tiny.build("mamba2")), tiny.tokens()), tiny.tokens()
    with torch.no_grad():
        expected = compiled(model)(ids, use_cache=False).logits
        model.save_pretrained(tmp_path)
        again: Any = type(model).from_pretrained(tmp_path).eval()
        assert torch.equal(compiled(again)(ids, use_cache=False).logits, expected)
        assert again.backbone.layers[0].mixer.loglinear.sizes.features == 16
    program = torch.export.export(Logits(model), (ids,))
    assert sum("level_readouts" in str(node.target) for node in program.graph.nodes) == 2
    assert difference(program.module()(ids), expected) < 1e-6


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, use_cache=False).logits


@pytest.mark.slow
def test_with_adapters(tmp_path: Path) -> None:
    """PEFT keeps a copy of the level weights: that one is trained, saved and loaded."""
    peft = pytest.importorskip("peft")
    model, ids = routed(lively(tiny.build("mamba2")), tiny.tokens()), tiny.tokens()
    llcompile.save_levels(model, tmp_path / "levels.safetensors")
    adapted = peft.get_peft_model(lively(tiny.build("mamba2")), peft.LoraConfig(target_modules=["in_proj"]))
    llcompile.convert(adapted, ids, options=ROUTED, verify=False, use_cache=False)
    llcompile.load_levels(adapted, tmp_path / "levels.safetensors")
    with torch.no_grad():
        expected = compiled(model)(ids, use_cache=False).logits
        assert difference(compiled(adapted)(ids, use_cache=False).logits, expected) < 1e-6
    llcompile.freeze_except_levels(adapted)
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert len(trained) == 10
    assert all("loglinear.modules_to_save.default." in name for name in trained)
    llcompile.save_levels(adapted, tmp_path / "again.safetensors")
    again = lively(tiny.build("mamba2"))
    llcompile.load_levels(again, tmp_path / "again.safetensors")
    with torch.no_grad():
        assert difference(compiled(again)(ids, use_cache=False).logits, expected) < 1e-6


class Apart(nn.Module):
    """Linear attention whose operands come from two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(8, 8), nn.Linear(8, 16)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        k, v = self.kv(y).chunk(2, -1)
        return (self.q(x) @ k.mT).tril() @ v


@pytest.mark.parametrize(
    ("make", "inputs", "kind", "why"),
    [
        (lambda: small.DeltaMixer(8, size=3), 1, "linear", r"the header of its state, K \* V numbers, has no room"),
        (Apart, 2, "static", "no common input"),
    ],
    ids=["no room", "no input"],
)
def test_where_a_mixer_allows_less(make: Callable[[], nn.Module], inputs: int, kind: str, why: str) -> None:
    """The report says what it got instead, and why; converting or compiling it again with the option is no error."""
    model, x = make(), [torch.randn(2, 12, 8) for _ in range(inputs)]
    before = model(*x)
    report = llcompile.convert(model, *x, options=ROUTED, verify=False)
    (record,) = report.converted
    assert record.level_weights == kind
    (note,) = record.notes
    assert note.startswith(f"its level weights are {kind} and not routed: ")
    assert re.search(why, note)
    assert llcompile.convert(model, *x, options=ROUTED, verify=False).converted[0].level_weights == kind
    run = compiled(model, options=ROUTED)
    assert difference(run(*x), before) < 1e-6
    small.perturb(model)
    assert difference(run(*x), before) > 1e-3
