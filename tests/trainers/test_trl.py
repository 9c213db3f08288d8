"""TRL: supervised fine-tuning of a converted model, of all of it or with adapters. See `test_installed.py`."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import llcompile
from tests.models import tiny

datasets = pytest.importorskip("datasets", reason="datasets is not installed; see test_installed.py")
trl = pytest.importorskip("trl", reason="TRL is not installed; see test_installed.py")
peft = pytest.importorskip("peft", reason="PEFT is not installed; see test_installed.py")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_dynamo")]

WORDS = [f"w{number}" for number in range(60)]


def tokenizer() -> PreTrainedTokenizerFast:
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    known = {word: number for number, word in enumerate((*special, *WORDS))}
    inner = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names)


def sequences() -> list[dict[str, list[int]]]:
    """Of unequal lengths, so that batches are padded."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(len(WORDS), (20 + 3 * n,), generator=generator).tolist() for n in range(6)]
    encode = tokenizer()
    return [{"input_ids": encode(" ".join(WORDS[n] for n in row)).input_ids} for row in rows]


@pytest.fixture(autouse=True)
def fingerprints(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made up: dill 0.4.1 fails on classes of pyarrow, and nothing here is looked up by its fingerprint."""
    from datasets.fingerprint import Hasher

    monkeypatch.setattr(Hasher, "hash", classmethod(lambda cls, value: uuid.uuid4().hex))


def trainer_of(model: Any, folder: Path, **more: Any) -> Any:
    arguments = trl.SFTConfig(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, max_length=48,
        save_strategy="no", report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False,
    )  # fmt: skip
    data = datasets.Dataset.from_list(sequences())
    return trl.SFTTrainer(
        model=model, args=arguments, train_dataset=data, eval_dataset=data, processing_class=tokenizer(), **more
    )


@pytest.mark.parametrize("adapters", [False, True], ids=["all of it", "adapters"])
def test_trains_level_weights(adapters: bool, tmp_path: Path) -> None:
    model: Any = tiny.build("mamba2")
    model.config.use_cache = False
    llcompile.convert(model, tiny.tokens(), verify=False, use_cache=False)
    model.compile(backend="loglinear", options={"inner": "eager"})
    config = peft.LoraConfig(target_modules=["in_proj"], modules_to_save=["loglinear"]) if adapters else None
    trainer = trainer_of(model, tmp_path, **({"peft_config": config} if adapters else {}))
    before = [p.detach().clone() for p in llcompile.level_parameters(trainer.model)]
    frozen = [(p, p.detach().clone()) for p in trainer.model.parameters() if not p.requires_grad]
    assert bool(frozen) == adapters
    start = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = list(llcompile.level_parameters(trainer.model))
    assert len(after) == len(before) == 4
    assert all(not torch.equal(p, old) for p, old in zip(after, before, strict=True))
    assert all(torch.equal(p, old) for p, old in frozen)
    trained = trainer.evaluate()["eval_loss"]
    assert trained < start
    with torch.no_grad():
        for p in after:
            p.normal_()
    assert abs(trainer.evaluate()["eval_loss"] - trained) > 1e-4
