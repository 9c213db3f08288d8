"""Boundary: what fails in looking at a program costs what was looked at, and not the program.

A recogniser meets whatever people write. An exception of its own inside a boundary is logged with its traceback (debug
level) and becomes a miss; the code runs as it is. Under tests (`LLCOMPILE_RAISE=1`) it is raised, so that it fails a
test and not a user's run.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch._dynamo.exc import TorchDynamoException

from llcompile.errors import LLCompileError
from llcompile.patterns import reasons
from llcompile.patterns.reasons import GivenReason

log = logging.getLogger("llcompile")

RAISE = "LLCOMPILE_RAISE"
# What is said to the user, and what makes Dynamo trace once more.
_MEANT = (LLCompileError, TorchDynamoException)


@dataclass
class Outcome:
    """How it went inside of a boundary."""

    error: Exception | None = None

    @property
    def failed(self) -> bool:
        """Whether an exception ended it."""
        return self.error is not None

    @property
    def given(self) -> GivenReason:
        """What a report says of it."""
        first = str(self.error).strip().split("\n")[0]
        return reasons.ANALYSIS_FAILED(error=f"{type(self.error).__name__}: {first}")


@contextmanager
def boundary(what: str) -> Iterator[Outcome]:
    """Keeps an exception of the block inside, except under tests, and what is meant for the user or for Dynamo.

    Args:
        what: what is looked at, for the log.
    """
    outcome = Outcome()
    try:
        yield outcome
    except _MEANT:
        raise
    except Exception as error:
        if raises():
            raise
        log.debug("llcompile failed in looking at %s", what, exc_info=True)
        outcome.error = error


def raises() -> bool:
    """Whether exceptions inside of a boundary are raised: tests ask for it."""
    return os.environ.get(RAISE, "") not in ("", "0")
