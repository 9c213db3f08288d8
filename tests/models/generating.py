"""Zoo models that generate."""

from __future__ import annotations

from typing import Any

import pytest

from tests.models import tiny

QUICK = ("mamba2",)


# A text tower without a head has a cache, and no `generate()`.
CAUSAL = tuple(name for name in tiny.CONFIGS if name != "glm5_next_text")


def some(names: tuple[str, ...], quick: tuple[str, ...] = QUICK) -> list[Any]:
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]
