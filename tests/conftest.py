"""Fixtures that every test may use."""

from __future__ import annotations

import gc
import getpass
import logging
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.tiers import is_long, is_second_case

# An exception inside of the recogniser costs a user's program a candidate, and fails a test.
os.environ["LLCOMPILE_RAISE"] = "1"
# Generated files are kept by what they depend on: one folder for all runs, so that each C++ file is compiled once, and
# not the user's own.
os.environ.setdefault("LLCOMPILE_KERNEL_DIR", str(Path(tempfile.gettempdir()) / f"llcompile_tests_{getpass.getuser()}"))


def _open_the_trace() -> None:
    """pytest listens to each logger that tells its parent nothing, for a run and for each test, and torch writes its
    traces (of each graph, guard and size) where anything listens: they took 5 % of the time, and what a failing test
    had logged was lost in them. A logger that tells its parent is left alone."""
    logging.getLogger("torch.__trace").propagate = True


_open_the_trace()  # before pytest listens for the run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tier of `make test` is what is not slow, that of `make check` what is neither slow nor long."""
    for item in items:
        if is_second_case(item.path, item.name):
            item.add_marker("slow")
        if isinstance(item, pytest.Function) and is_long(item.path, item.originalname, item.fixturenames):
            item.add_marker("long")


def pytest_collection_finish(session: pytest.Session) -> None:
    """What the imports have made stays; a tenth of all time went into looking through it for garbage."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Libraries complain at exit about what is never collected."""
    gc.unfreeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol() -> None:
    """Here as well, as torch closes it again whenever its logs are set."""
    _open_the_trace()


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same random stream, whichever tests ran before it."""
    random.seed(0)
    torch.manual_seed(0)
    return 0


@pytest.fixture
def warm_dynamo() -> Iterator[None]:
    """For tests that share a compiled model: what an earlier one has compiled is used again, `fresh_dynamo` or not."""
    with torch._dynamo.config.patch(recompile_limit=64, accumulated_recompile_limit=256):
        yield


@pytest.fixture
def fresh_dynamo(request: pytest.FixtureRequest) -> Iterator[None]:
    """Nothing compiled before or after: for tests that count compilations or look at what a compiler was handed."""
    if "warm_dynamo" in request.fixturenames:
        yield
        return
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=torch._dynamo.config.recompile_limit):  # tests may raise it
        yield
    torch._dynamo.reset()
