"""What a trial takes as data, and what it says about what it does not take."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llcompile.errors import TrialError
from llcompile.trials.batches import HELD_OUT, IGNORED, TRAIN, as_batch, held_out, training
from llcompile.trials.sources import Cut, named, source

TOKENS = torch.arange(12).view(2, 6)
CUT = Cut(batch=4, length=8, held_length=16)


def test_the_next_token_is_the_label() -> None:
    batch = as_batch(TOKENS.int(), "it")
    assert batch.tokens.dtype == torch.int64
    assert batch.labels.tolist() == [[1, 2, 3, 4, 5, IGNORED], [7, 8, 9, 10, 11, IGNORED]]


def test_a_mapping_tells_more() -> None:
    mask = torch.ones(2, 6)
    batch = as_batch({"input_ids": TOKENS, "labels": TOKENS, "distance": TOKENS, "attention_mask": mask}, "it")
    assert torch.equal(batch.labels, TOKENS)
    assert batch.distance is not None
    assert list(batch.inputs) == ["attention_mask"]
    assert torch.equal(as_batch((TOKENS, TOKENS + 1), "it").labels, TOKENS + 1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("text", "it is a str; expected tokens"),
        ({"x": TOKENS}, "it has x; expected `tokens` or `input_ids`"),
        (TOKENS.float(), r"tokens must be a tensor of whole numbers \[B, T\], got a torch.float32 tensor"),
        (TOKENS[0], r"tokens has the shape \[6\], expected \[B, T\]"),
        ((TOKENS, TOKENS[:, 1:]), r"labels has the shape \[2, 5\], expected \[2, 6\], as the tokens"),
        ({"tokens": TOKENS, "distance": TOKENS[:1]}, r"distance has the shape \[1, 6\]"),
        ((TOKENS, torch.full_like(TOKENS, IGNORED)), "it has no label: all 12 of them are -100"),
    ],
)
def test_what_is_no_batch(given: Any, message: str) -> None:
    with pytest.raises(TrialError, match=message):
        as_batch(given, "it")


def growing(split: str, seed: int) -> Iterator[Tensor]:
    yield torch.zeros(2, 6, dtype=torch.long)
    yield torch.zeros(2, 7, dtype=torch.long)


def test_batches_of_other_shapes() -> None:
    with pytest.raises(TrialError, match=r"training batch 2 of seed 3 has the shape \[2, 7\], the first one \[2, 6\]"):
        list(training(growing, 3, 2))
    with pytest.raises(TrialError, match=r"held-out batches have sequences of \[6, 7\] tokens"):
        held_out(growing, 9)
    with pytest.raises(TrialError, match="the data end after 1 training batches with seed 0; 5 are needed"):
        list(training(lambda split, seed: islice(growing(split, seed), 1), 0, 5))
    with pytest.raises(TrialError, match="no held-out batch"):
        held_out(lambda split, seed: [], 9)
    with pytest.raises(TrialError, match="a held-out batch has one sequence"):
        held_out(lambda split, seed: [TOKENS[:1]], 9)


def test_a_stream_is_cut_at_random_and_its_end_held_out() -> None:
    tokens = torch.arange(1000)
    made = source(tokens, CUT)
    first, again, other = (next(iter(made(TRAIN, seed)))[0] for seed in (0, 0, 1))
    assert first.shape == (4, 8)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert all(int(x.max()) < 900 for x, _ in islice(made(TRAIN, 0), 200))
    held = list(made(HELD_OUT, 0))
    assert held[0][0].shape == (4, 16)
    assert int(held[0][0].min()) >= 900
    assert torch.equal(held[0][1], held[0][0] + 1)


def test_a_table_is_shuffled_and_its_last_rows_held_out() -> None:
    tokens = torch.arange(40)[:, None].expand(40, 16)
    made = source(tokens, CUT)
    seen = [set(x[:, 0].tolist()) for x in islice(made(TRAIN, 0), 9)]
    assert set.union(*seen) == set(range(36))
    assert [x.tolist()[0][0] for x in made(HELD_OUT, 0)] == [36]
    assert next(iter(made(HELD_OUT, 0))).shape == (4, 16)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(3, 4), "the data are a torch.float32 tensor"),
        (torch.arange(100), "the data have 100 tokens; held-out sequences of 16 need at least 340"),
        (torch.zeros(4, 30, dtype=torch.long), "the data have 4 sequences"),
        (torch.zeros(40, 5, dtype=torch.long), "sequences of 5 tokens, shorter than the length 8"),
        ("words", "batches is a str"),
    ],
)
def test_what_is_no_data(given: Any, message: str) -> None:
    with pytest.raises(TrialError, match=message):
        source(given, CUT)


def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.randint(256, (1000,))
    (tmp_path / "text.txt").write_bytes(bytes(tokens.tolist()))
    torch.save({"tokens": tokens}, tmp_path / "a.pt")
    np.save(tmp_path / "b.npy", tokens.numpy())
    (tmp_path / "made.py").write_text("def batches(split, seed):\n    yield split, seed\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "made", raising=False)  # other tests make one of this name
    found = [next(iter(named(name, CUT)(TRAIN, 0)))[0] for name in ("text.txt", "a.pt", "b.npy")]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert list(named("made:batches", CUT)(TRAIN, 7)) == [(TRAIN, 7)]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere.txt", "no such file"),
        ("broken.pt", "--data broken.pt cannot be read"),
        ("empty.pt", "holds no tensor of tokens"),
        ("no_such_module_at_all:batches", "cannot import"),
        ("json:batches", "has no function 'batches'"),
    ],
)
def test_what_cannot_be_read(spec: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.pt").write_text("no archive")
    torch.save({"a": TOKENS, "b": TOKENS}, tmp_path / "empty.pt")
    with pytest.raises(TrialError, match=message):
        named(spec, CUT)
