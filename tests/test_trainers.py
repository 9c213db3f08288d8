"""The backend by its name in transformers' Trainer and in accelerate, which have a closed list of backends."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import llcompile
from tests.helpers import small
from tests.models import tiny


class WithLoss(nn.Module):
    """The small model as Trainer wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small.model()

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        logits = self.inner(ids)
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten()), "logits": logits}


def rows(count: int) -> list[dict[str, Tensor]]:
    ids = torch.randint(0, 20, (count, 24), generator=torch.Generator().manual_seed(0))
    return [{"ids": row, "labels": row.roll(-1)} for row in ids]


def converted() -> WithLoss:
    model = WithLoss()
    llcompile.convert(model, torch.stack([row["ids"] for row in rows(2)]), verify=False)
    return model


def level_parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "loglinear" in name}


def test_the_enum_is_as_if_it_had_been_written_with_it() -> None:
    from accelerate.utils import DynamoBackend, TorchDynamoPlugin

    assert DynamoBackend("LOGLINEAR") is DynamoBackend.LOGLINEAR is DynamoBackend["LOGLINEAR"]
    assert "LOGLINEAR" in DynamoBackend
    assert DynamoBackend.list()[-1] == str(DynamoBackend.LOGLINEAR) == "LOGLINEAR"
    assert copy.deepcopy(DynamoBackend.LOGLINEAR) is DynamoBackend.LOGLINEAR
    assert TorchDynamoPlugin(backend="loglinear").to_dict()["backend"] == "loglinear"
    with pytest.raises(ValueError, match="NOSUCH"):
        TorchDynamoPlugin(backend="nosuch")


def test_accelerator_trains_level_weights() -> None:
    model = converted()
    before = level_parameters(model)
    runner = accelerate.Accelerator(dynamo_backend="loglinear", cpu=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prepared, optimizer = runner.prepare(model, optimizer)
    batch = {name: torch.stack([row[name] for row in rows(2)]) for name in ("ids", "labels")}
    runner.backward(prepared(**batch)["loss"])
    optimizer.step()
    after = level_parameters(model)
    assert before.keys() == after.keys() != set()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_accelerator_saves_loads_and_unwraps(tmp_path: Path, fresh_dynamo: None) -> None:
    model = converted()
    plugin = accelerate.utils.TorchDynamoPlugin(backend="loglinear", options={"inner": "eager"})
    runner = accelerate.Accelerator(dynamo_plugin=plugin, cpu=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prepared, optimizer = runner.prepare(model, optimizer)
    batch = {name: torch.stack([row[name] for row in rows(2)]) for name in ("ids", "labels")}
    runner.backward(prepared(**batch)["loss"])
    optimizer.step()
    expected = prepared(**batch)["logits"].detach()
    runner.save_state(str(tmp_path))
    small.perturb(model)
    assert small.difference(prepared(**batch)["logits"], expected) > 1e-3
    runner.load_state(str(tmp_path))
    assert small.difference(prepared(**batch)["logits"], expected) < 1e-6
    assert runner.unwrap_model(prepared, keep_torch_compile=False) is model


@pytest.mark.slow
def test_trainer_with_gradient_checkpointing_ends_with_the_best_model(tmp_path: Path, fresh_dynamo: None) -> None:
    """A model of transformers; the evaluations that choose are of the compiled model."""
    from transformers import Trainer, TrainingArguments

    model: Any = tiny.build("mamba2")
    model.config.use_cache = False
    llcompile.convert(model, tiny.tokens(), verify=False, use_cache=False)
    model.compile(backend="loglinear", options={"inner": "eager"})
    data = [{"input_ids": row, "labels": row} for row in torch.randint(3, 90, (4, 24))]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=2, learning_rate=0.3, report_to=[],
        gradient_checkpointing=True, eval_strategy="steps", save_strategy="steps", eval_steps=1, save_steps=1,
        load_best_model_at_end=True, use_cpu=True, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)
    start = level_parameters(model)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == 4
    assert max(losses) - min(losses) > 1e-3
    assert abs(trainer.evaluate()["eval_loss"] - min(losses)) < 1e-5
    assert all(
        not torch.equal(p, start[name]) for name, p in level_parameters(model).items() if p.dtype.is_floating_point
    )
    small.perturb(model)
    assert abs(trainer.evaluate()["eval_loss"] - min(losses)) > 1e-4


@pytest.mark.parametrize("bf16", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_trainer_trains_saves_resumes_and_evaluates(tmp_path: Path, bf16: bool) -> None:
    from transformers import Trainer, TrainingArguments

    def trainer(model: nn.Module, steps: int) -> Trainer:
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=steps,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            torch_compile_backend="loglinear",
            bf16=bf16,
            save_steps=2,
            report_to=[],
            use_cpu=True,
            label_names=["labels"],
        )
        return Trainer(model=model, args=arguments, train_dataset=rows(8), eval_dataset=rows(4))

    model = converted()
    before = level_parameters(model)
    trainer(model, 2).train()
    after = level_parameters(model)
    assert any(not torch.equal(before[name], after[name]) for name in before)

    again = converted()
    resumed = trainer(again, 4)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    assert any(not torch.equal(after[name], p) for name, p in level_parameters(again).items())
    acting = resumed.evaluate()["eval_loss"]
    for name, p in again.named_parameters():
        if "loglinear" in name:
            nn.init.normal_(p.data, std=2.0)
    assert abs(resumed.evaluate()["eval_loss"] - acting) > 1e-4
