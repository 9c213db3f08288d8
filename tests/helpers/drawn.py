"""How hypothesis draws: the same examples each time in `make test`, fresh ones in `make test-all`.

A fresh example that fails is kept in tests/kept/ and tried first from then on: commit that folder with the mend.
"""

from __future__ import annotations

from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis.database import DirectoryBasedExampleDatabase

KEPT = Path(__file__).parents[1] / "kept"
# Every test has fixtures of conftest.py that are made once, not for each example.
_CHECKS = (HealthCheck.function_scoped_fixture,)


def fixed(examples: int) -> settings:
    """For the fast tests."""
    return settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=_CHECKS)


def fresh(examples: int) -> settings:
    """For the slow tests."""
    kept = DirectoryBasedExampleDatabase(KEPT)
    return settings(max_examples=examples, deadline=None, database=kept, print_blob=True, suppress_health_check=_CHECKS)
