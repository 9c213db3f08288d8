"""The Mixer node and its validator."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from llcompile.errors import MixerError
from llcompile.patterns.families import FAMILIES
from llcompile.patterns.mixer import Mixer, MixerShape, validate

B, T, G, H, K, V = 2, 3, 2, 4, 5, 6


def operands(decay: str = "none", correction: str = "none", step: bool = False) -> dict[str, Any]:
    time = () if step else (T,)
    q = torch.zeros(B, *time, G, K)
    decays = {"none": None, "scalar": torch.zeros(B, *time, H), "channel": torch.zeros(B, *time, H, K)}
    beta = torch.zeros(B, *time, H) if correction == "delta" else None
    value = torch.zeros(B, *time, H, V)
    erase = q if correction == "erase" else None
    return {
        "decay": decay,
        "correction": correction,
        "query": q,
        "key": q,
        "value": value,
        "log_decay": decays[decay],
        "beta": beta,
        "erase_query": erase,
        "erase_key": erase,
        "step": step,
    }


@pytest.mark.parametrize("step", [False, True])
@pytest.mark.parametrize(("decay", "correction"), FAMILIES)
def test_every_family_is_accepted(decay: str, correction: str, step: bool) -> None:
    assert validate(Mixer(**operands(decay, correction, step))) == MixerShape(H, G, K, V)


def test_it_is_frozen() -> None:
    mixer = Mixer(**operands())
    with pytest.raises(dataclasses.FrozenInstanceError):
        mixer.scale = 2.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        (("rotary", "none"), {}, "no family has decay 'rotary'"),
        (("scalar", "none"), {"log_decay": None}, "decay 'scalar' does not fit a log_decay that is absent"),
        (("none", "none"), {"log_decay": torch.zeros(B, T, H)}, "decay 'none' does not fit a log_decay that is given"),
        (("none", "delta"), {"beta": None}, "correction 'delta' does not fit a beta that is absent"),
        (("none", "none"), {"beta": torch.zeros(B, T, H)}, "correction 'none' does not fit a beta that is given"),
        (("none", "erase"), {"erase_key": None}, "correction 'erase' does not fit an erase_key that is absent"),
        (("scalar", "none"), {"decay_rate": torch.zeros(H, K)}, "decay 'scalar' does not fit rates per channel"),
    ],
)
def test_what_contradicts_itself_is_not_made(family: tuple[str, str], change: dict[str, Any], message: str) -> None:
    given = operands() if family[0] == "rotary" else operands(*family)
    with pytest.raises(MixerError, match=message):
        Mixer(**{**given, "decay": family[0], "correction": family[1], **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(B, G, K)}, "query is .* expected 4 axes"),
        ({"value": torch.zeros(B, T, H, V, 1)}, "value is .* expected 4 axes"),
        ({"key": torch.zeros(B, T, G, K + 1)}, "key is .* expected the query's"),
        ({"key": torch.zeros(B, T, 1, K)}, "key is .* expected the query's"),
        ({"value": torch.zeros(B, T, 3, V)}, "3 value heads are not a multiple of 2"),
        ({"log_decay": torch.zeros(B, T, H)}, "log_decay is .* expected 4 axes that end in"),
        ({"log_decay": torch.zeros(B, T, H, V)}, "log_decay is .* expected 4 axes that end in"),
        ({"log_decay": torch.zeros(H, K)}, "log_decay is .* expected 4 axes that end in"),
        ({"beta": torch.zeros(B, T, H, V)}, "beta is .* expected 3 axes that end in"),
        ({"beta": torch.zeros(B, T, G)}, "beta is .* expected 3 axes that end in"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(MixerError, match=message):
        validate(Mixer(**{**operands("channel", "delta"), **change}))


def test_a_step_has_no_time_axis() -> None:
    with pytest.raises(MixerError, match=r"query is .* expected 3 axes"):
        validate(Mixer(**{**operands("scalar"), "step": True}))
