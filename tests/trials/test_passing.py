"""State passing: which models can, and what is measured of those that cannot."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from llcompile.trials.arms import PASSING, STAY, Arm
from llcompile.trials.batches import as_batch
from llcompile.trials.passing import detached, protocol_of, refusal
from llcompile.trials.plan import Plan
from llcompile.trials.running import Runner, build
from tests.trials.models import VOCABULARY, Model, Recurrent


def tokens() -> Tensor:
    return torch.randint(VOCABULARY, (2, 8))


def test_a_model_that_passes_a_state() -> None:
    assert refusal(Recurrent(), tokens(), {}) == ""


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Model(), "the model's forward takes no state"),
        (Recurrent("ignores"), "a sequence that is continued from a state differs from the whole one by"),
        (Recurrent("wrong"), "a sequence that is continued from a state differs from the whole one by"),
        (Recurrent("useless"), "its state has no effect: without it the outputs differ by 0.0e"),
        (Recurrent("grows"), "its state grows with the sequence"),
        (Recurrent("raises"), "with `initial_state`, the model raised RuntimeError: not written yet"),
    ],
    ids=["no state", "ignores", "wrong", "useless", "grows", "raises"],
)
def test_a_model_that_does_not(model: nn.Module, reason: str) -> None:
    was = model.training
    assert reason in refusal(model, tokens(), {})
    assert model.training == was


def runner(what: str) -> Runner:
    plan = Plan(inner="eager", device="cpu")
    made = build(Arm(what, "", 1e-3), Recurrent, as_batch(tokens(), "it"), plan, 4)
    made.start(Recurrent().state_dict(), 0)
    return made


def test_the_arm_starts_a_batch_where_the_last_one_ended() -> None:
    first, second = as_batch(tokens(), "it"), as_batch(tokens(), "it")
    passes, stays = runner(PASSING), runner(STAY)
    torch.testing.assert_close(passes.training_logits(first), stays.training_logits(first))
    whole = stays.logits(as_batch(torch.cat([first.tokens, second.tokens], 1), "it"))[:, 8:]
    torch.testing.assert_close(passes.training_logits(second), whole)
    assert not torch.allclose(stays.training_logits(second), whole)
    passes.start(Recurrent().state_dict(), 1)
    torch.testing.assert_close(passes.training_logits(second), stays.logits(second))


def test_a_state_has_no_history() -> None:
    x = torch.ones(2, requires_grad=True) * 2
    found = detached({"a": [x], "b": (x, 3)})
    assert not found["a"][0].requires_grad
    assert not found["b"][0].requires_grad
    assert found["b"][1] == 3
    assert x.requires_grad


@pytest.mark.parametrize(("name", "passes"), [("mamba2", True), ("qwen3_next", False)])
def test_models_of_transformers(name: str, passes: bool) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "mamba2": {"num_heads": 2, "head_dim": 16, "expand": 1, "state_size": 4, "n_groups": 1, "num_hidden_layers": 1},
        "qwen3_next": {
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "linear_num_key_heads": 1,
            "linear_num_value_heads": 1, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_hidden_layers": 2,
            "layer_types": ["linear_attention", "full_attention"], "intermediate_size": 32, "mlp_only_layers": [0, 1],
        },
    }[name]  # fmt: skip
    special = {"vocab_size": VOCABULARY, "hidden_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.AutoConfig.for_model(name, **special, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert protocol_of(model) is not None
    reason = refusal(model, tokens(), {})
    assert (reason == "") == passes, reason
    assert passes or "its state grows with the sequence" in reason
