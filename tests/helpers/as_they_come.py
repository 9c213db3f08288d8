"""A pytest plugin (`-p tests.helpers.as_they_come`): each failure is written to the file FAILURES when it happens.

pytest tells them at the end of a run, and a run with a time limit may be ended before that.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Characters of what a test printed.
_PRINTED = 6000


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write it, in the process that hears of all tests."""
    name = os.environ.get("FAILURES")
    if name and report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        printed = (f"--- {title}\n{text[-_PRINTED:]}\n" for title, text in report.sections)
        with Path(name).open("a") as file:
            file.write(f"===== {report.nodeid} ({report.when})\n{report.longreprtext}\n{''.join(printed)}\n")
