"""Compositions at random: a converted program computes what it did, with its gradients, and acts; see tests/fuzz.

300 programs of a fresh seed in `make test-all`; LLCOMPILE_FUZZ_SEED repeats them. A few of a fixed seed in `make test`.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.fuzz.expected import expect
from tests.fuzz.program import drawn
from tests.fuzz.recipes import Recipe, draw
from tests.fuzz.run import run
from tests.fuzz.shrink import shrunk

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

# The workers of one run of pytest-xdist have its id in common.
SEED = os.environ.get("LLCOMPILE_FUZZ_SEED") or str(
    random.Random(os.environ.get("PYTEST_XDIST_TESTRUNUID")).randrange(10**6)
)
MANY, BATCH = 300, 10
# Every so many of the seed "fixed" for `make test`, whether they pass or not; an odd number, so that half are mutated.
STRIDE = 61


def failures(seed: str, numbers: Iterable[int], folder: Path) -> tuple[list[str], Counter[str]]:
    """The programs that fail, each with what happened; and how the others ended."""
    failed, ended = [], Counter[str]()
    for number in numbers:
        recipe, text = drawn(f"{seed}-{number}", mutate=number % 2 == 1)
        path = folder / f"fuzz_{seed}_{number}.py"
        path.write_text(text)
        try:
            ended[expect(recipe, run(path))] += 1
        except Exception as error:  # whatever comes is shown beside its program
            failed.append(f"# {type(error).__name__}: {error}\n# program {number} of seed {seed}:\n{text}")
    return failed, ended


@pytest.mark.parametrize("number", range(0, MANY, STRIDE))
def test_a_few(number: int, tmp_path: Path) -> None:
    failed, _ = failures("fixed", [number], tmp_path)
    assert not failed, failed[0]


@pytest.mark.slow
@pytest.mark.parametrize("batch", range(MANY // BATCH))
def test_many(batch: int, tmp_path: Path) -> None:
    print(f"LLCOMPILE_FUZZ_SEED={SEED}")
    failed, ended = failures(SEED, range(batch * BATCH, (batch + 1) * BATCH), tmp_path)
    print(dict(ended))
    assert not failed, f"{len(failed)} of {BATCH} programs (LLCOMPILE_FUZZ_SEED={SEED}):\n" + "\n\n".join(failed)
    assert ended["converted"], "half of these are mixers, and none was converted: nothing was tested"


def test_programs_are_what_their_seed_says() -> None:
    """The same text for the same seed; mutated ones differ from what they were made of."""
    texts = [drawn(f"any-{number}", mutate=number % 2 == 1)[1] for number in range(60)]
    assert texts == [drawn(f"any-{number}", mutate=number % 2 == 1)[1] for number in range(60)]
    for number in range(1, 60, 2):
        assert texts[number].split("class Layer")[1] != drawn(f"any-{number}", mutate=False)[1].split("class Layer")[1]


PLAIN = """
from torch import nn
from tests.fuzz.check import *

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.all, self.seen = nn.Linear(12, 36), nn.Parameter(torch.ones(()))

    def forward(self, x):
        q, k, v = self.all(x).chunk(3, -1)
        o = (q @ k.mT).tril() @ v
        return {returned}

make, LENGTHS, D = Model, (14, 30, 5), 12


def runner(model, compile):
    return {held}
"""


@pytest.mark.parametrize(
    ("returned", "held", "message"),
    [
        ("o * self.seen", "compile(model)", ""),
        ("o * self.seen", "model", "noise on the level weights moves the output by 0"),
        ("o * (1.0 if torch.compiler.is_compiling() else 1.1)", "compile(model)", "output: differs by"),
        ("o * (self.seen if torch.compiler.is_compiling() else 1.0)", "compile(model)", "seen.grad: off by"),
    ],
    ids=["as it is", "run eagerly", "another output", "another gradient"],
)
def test_the_check_can_fail(returned: str, held: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "plain.py"
    path.write_text(PLAIN.format(returned=returned, held=held))
    if not message:
        assert run(path).converted
        return
    with pytest.raises(AssertionError, match=message):
        run(path)


def _report(converted: int, *reasons: str) -> Any:
    declined = [SimpleNamespace(reason=reason) for reason in reasons]
    return SimpleNamespace(converted=(None,) * converted, declined=declined, untouched=())


def _recipe(**fields: Any) -> Recipe:
    return replace(draw("any"), **{"layers": 2, **fields})


def test_a_mixer_is_converted_and_nothing_is_missed_without_a_word() -> None:
    assert expect(_recipe(), _report(2)) == "converted"
    assert expect(_recipe(mutation="softmax"), _report(0, "not linear in the query")) == "left"
    with pytest.raises(AssertionError, match="a mixer is left as it is"):
        expect(_recipe(), _report(1, "its reach is limited: a window"))
    for mutation in ("", "softmax"):
        with pytest.raises(AssertionError, match="without a word"):
            expect(_recipe(mutation=mutation), _report(0))


def test_a_failing_program_is_made_smaller() -> None:
    """All goes but what it takes to fail."""
    recipe = _recipe(in_place="relu", hook="output", model="twice", around="silu", runner="dict", layout="TBHD")
    smaller = shrunk(recipe, lambda r: r.in_place == "relu" and r.layout == "TBHD")
    assert (smaller.in_place, smaller.layout) == ("relu", "TBHD")
    assert (smaller.hook, smaller.model, smaller.around, smaller.runner) == ("none", "residual", "nothing", "the model")
    assert smaller.spelling == recipe.spelling
    assert smaller.layers == 1
