"""Fixtures that every test may use."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest
import torch

# An exception inside of the recogniser costs a user's program a candidate, and fails a test.
os.environ["LLCOMPILE_RAISE"] = "1"


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same random stream, whichever tests ran before it."""
    random.seed(0)
    torch.manual_seed(0)
    return 0


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Nothing compiled before or after: for tests that count compilations or look at what a compiler was handed."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=torch._dynamo.config.recompile_limit):  # tests may raise it
        yield
    torch._dynamo.reset()
