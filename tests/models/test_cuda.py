"""Whole models on a GPU: convert, Inductor, gradients, 16 bits and decoding through the Triton kernels.

Skipped where there is no GPU; `benchmarks/on_gpu.sh` runs it where there is one.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import llcompile
from llcompile.commands import self_test
from llcompile.kernels.triton import engine, step
from llcompile.patterns.families import FAMILIES
from tests.helpers import small
from tests.helpers.small import difference
from tests.models import tiny
from tests.models.converted import compiled, lively, steps, weights_of

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
    pytest.mark.usefixtures("fresh_dynamo"),
]

NAMES = ("mamba2", "qwen3_next", "kimi_linear", "olmo_hybrid")
# Sizes as they are on a GPU: tensor cores want 16 at least.
SIZES: dict[str, dict[str, Any]] = {
    "mamba2": {"state_size": 32, "num_heads": 6, "head_dim": 16},
    "qwen3_next": {"linear_key_head_dim": 32, "linear_value_head_dim": 32},
    "kimi_linear": {"linear_head_dim": 32},
    "olmo_hybrid": {"linear_key_head_dim": 32, "linear_value_head_dim": 48},
}


@pytest.fixture(autouse=True)
def exact_products() -> Any:
    """The rest of the model in full float32, so that errors are the kernels'."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The passes that the Triton kernels ran: without them a test would only see ATen."""
    seen: list[str] = []
    for module, name in ((engine, "forward"), (engine, "backward"), (step, "step")):
        real = getattr(module, name)

        def watched(*args: Any, real: Any = real, name: str = name, **kwargs: Any) -> Any:
            seen.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, watched)
    return seen


def build(name: str) -> Any:
    """A model with sizes as they are on a GPU.

    Experts run by a batched product: before transformers 5.23, Inductor cannot trace the gradient of the grouped one,
    and the model would be compiled in small pieces (tests/torch_internals/test_untraceable.py), which takes minutes.
    """
    model = lively(tiny.build(name, **SIZES[name])).cuda()
    model.config._experts_implementation = "batched_mm"
    return model


def ids(batch: int = 2, length: int = 150) -> Tensor:
    return tiny.tokens(batch, length).cuda()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_converts_and_acts(name: str, inner: str, launched: list[str]) -> None:
    """Equal at weights of 1, other with noise, a gradient for every level weight, and the model's own gradients."""
    model, tokens = build(name), ids()
    own = copy.deepcopy(model)
    before = tiny.logits(own(tokens, use_cache=False))
    small.loss(before, tokens).backward()
    report = llcompile.convert(model, tokens)
    assert (len(report.converted), report.declined) == (tiny.MIXERS[name], ())
    run = compiled(model, inner)
    after = tiny.logits(run(tokens, use_cache=False))
    assert difference(after, before) < 1e-4
    small.loss(after, tokens).backward()
    assert {"forward", "backward"} <= set(launched)
    assert all(p.grad is not None and bool(p.grad.any()) for p in weights_of(model).values())
    scale = max(float(p.grad.abs().max()) for p in own.parameters() if p.grad is not None)
    ours = dict(model.named_parameters())
    for path, p in own.named_parameters():
        if p.grad is not None:
            assert ours[path].grad is not None, path
            assert float((p.grad - ours[path].grad).abs().max()) <= 1e-3 * float(p.grad.abs().max()) + 1e-4 * scale, (
                path
            )
    with torch.no_grad():
        small.perturb(model)
        assert difference(tiny.logits(run(tokens, use_cache=False)), before) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_trains_in_bfloat16(name: str) -> None:
    """AdamW on level weights and all others under autocast: the loss falls, and stays finite."""
    model, tokens = build(name).train(), ids(4, 200)
    llcompile.convert(model, tokens)
    run = compiled(model, "inductor")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = small.loss(tiny.logits(run(tokens, use_cache=False)).float(), tokens)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_as_near_as_the_models_own(name: str, launched: list[str]) -> None:
    """A bfloat16 model: at most twice as far from float32 as the unconverted one."""
    low, tokens = build(name).to(torch.bfloat16), ids()
    with torch.no_grad():
        exact = tiny.logits(copy.deepcopy(low).float()(tokens, use_cache=False))
        own = difference(tiny.logits(low(tokens, use_cache=False)).float(), exact)
        llcompile.convert(low, tokens)
        ours = difference(tiny.logits(compiled(low, "inductor")(tokens, use_cache=False)).float(), exact)
    assert "forward" in launched
    assert ours <= 2 * own


@pytest.mark.parametrize("name", NAMES)
def test_decodes(name: str, launched: list[str]) -> None:
    """Prefill and single steps with level weights that are not 1 give what the whole pass gives."""
    model, tokens = build(name), ids(2, 48)
    with torch.no_grad():
        llcompile.convert(model, tokens)
        small.perturb(model)
        run = compiled(model)
        whole = tiny.logits(run(tokens, use_cache=False))
        parts = torch.cat(list(steps(run, name, tokens, prefill=29)), dim=1)
    assert difference(parts, whole) < 1e-4
    assert {"forward", "step"} <= set(launched)


@pytest.mark.parametrize(("decay", "correction"), FAMILIES)
def test_every_family_acts(decay: str, correction: str) -> None:
    """The self-test that `llcompile doctor` runs on a GPU."""
    assert "level weights train" in self_test._family(decay, correction, self_test.Place("cuda"))
