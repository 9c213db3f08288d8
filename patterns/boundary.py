"""Boundary: what fails in looking at a program costs what was looked at, and not the program.

A recogniser meets whatever people write. Three kinds of exceptions come up in it, and they are kept apart:

* `NotKnown` is raised on purpose, where a question has no answer for this program: an axis that a rule cannot follow,
  tensors whose axes do not fit. Whoever puts the question expects it.
* What the user's operations raise when they are run at other sizes, or on tensors without numbers, says that they do
  not run there. `running` makes a `CannotRun` of it, a `NotKnown`, too.
* Anything else is a defect of llcompile: a typo in a rule, a wrong call. Inside of a `boundary` it is logged with its
  traceback (debug level) and becomes a miss; the code runs as it is. Under tests (`LLCOMPILE_RAISE=1`) it is raised, so
  that it fails a test and not a user's run.
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
_OURS = "_llcompile"  # an attribute of exceptions that code of llcompile raised while the program's operations ran


class NotKnown(Exception):
    """A question has no answer for this program."""


class CannotRun(NotKnown):
    """An operation of the user's program does not run here; `__cause__` is what it raised."""


# What cannot be found out by running tensors: as above, and where torch refuses (shapes that do not fit, no memory).
NOT_SHOWN = (NotKnown, RuntimeError, MemoryError)


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
def boundary(what: str, *expected: type[Exception]) -> Iterator[Outcome]:
    """Keeps an exception of the block inside, except under tests, and what is meant for the user or for Dynamo.

    Args:
        what: what is looked at, for the log.
        expected: exceptions that the block raises on purpose; they stay inside under tests, too.
    """
    outcome = Outcome()
    try:
        yield outcome
    except expected as error:
        outcome.error = error
    except _MEANT:
        raise
    except Exception as error:
        if raises():
            raise
        log.debug("llcompile failed in looking at %s", what, exc_info=True)
        outcome.error = error


@contextmanager
def running(what: object) -> Iterator[None]:
    """For a block that does nothing but run operations of the user's program.

    Args:
        what: the operations.

    Raises:
        CannotRun: they raised something.
    """
    try:
        yield
    except NotKnown:
        raise
    except Exception as error:
        if hasattr(error, _OURS):
            if raises():
                raise
            log.debug("llcompile failed in running %s", what, exc_info=True)
        raise CannotRun(str(what)) from error


@contextmanager
def called_back() -> Iterator[None]:
    """For llcompile's own code inside of a `running` block (a dispatch mode): what it raises is not the program's."""
    try:
        yield
    except NotKnown:
        raise
    except Exception as error:
        setattr(error, _OURS, True)
        raise


def raises() -> bool:
    """Whether exceptions inside of a boundary are raised: tests ask for it."""
    return os.environ.get(RAISE, "") not in ("", "0")
