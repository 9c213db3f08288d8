"""Layers of one class that differ in a single thing: each is reported as what it is, and not as its neighbours are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import llcompile
from tests.helpers.looked import Handmade, inputs

ODD, COUNT = 2, 4


class Layer(Handmade):
    """A mixer, or a near miss that sees the next token, depending on what it holds."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index
        self.register_buffer("ahead", torch.tensor(False))

    def looks_ahead(self) -> bool:
        """Overridden below."""
        return self.diagonal == 2

    def forward(self, x: Tensor) -> Tensor:
        self.diagonal = 2 if self.looks_ahead() else 1
        return super().forward(x)


class ByIndex(Layer):
    def looks_ahead(self) -> bool:
        return self.index == ODD


class ByBuffer(Layer):
    """Breaks the graph in each layer."""

    def looks_ahead(self) -> bool:
        return bool(self.ahead)


def layers(kind: type[Layer]) -> nn.Sequential:
    return nn.Sequential(*(kind(index) for index in range(COUNT)))


def by_attribute() -> nn.Sequential:
    model = layers(Layer)
    model[ODD].diagonal = 2  # type: ignore[assignment]
    return model


def by_buffer() -> nn.Sequential:
    model = layers(ByBuffer)
    model[ODD].ahead.fill_(True)  # type: ignore[operator, union-attr]
    return model


def by_hook() -> nn.Sequential:
    def look_ahead(layer: nn.Module, _: object) -> None:
        layer.diagonal = 2  # type: ignore[assignment]

    model = layers(Layer)
    model[ODD].register_forward_pre_hook(look_ahead)
    return model


@pytest.mark.parametrize("made", [by_attribute, by_buffer, by_hook, lambda: layers(ByIndex)])
def test_the_odd_layer_is_declined_and_its_neighbours_are_not(made: Callable[[], nn.Sequential]) -> None:
    torch.manual_seed(0)
    look = llcompile.inspect(made(), inputs())
    assert [m.fate for m in look.mixers] == ["declined" if i == ODD else "converted" for i in range(COUNT)]
    rows = look.to_dict()["groups"]
    assert [(row["modules"], row["count"], row["fate"]) for row in rows] == [
        ("0-1,3", COUNT - 1, "converted"),
        (str(ODD), 1, "declined"),
    ]


def test_without_the_difference_all_are_converted_in_one_row() -> None:
    look = llcompile.inspect(layers(Layer), inputs())
    assert [m.fate for m in look.mixers] == ["converted"] * COUNT
    (row,) = look.to_dict()["groups"]
    assert (row["modules"], row["count"], row["parameters"]) == ("0-3", COUNT, look.parameters)


def test_a_hook_that_shortens_the_sequence_shows_in_the_sizes() -> None:
    model = layers(Layer)
    model[-1].register_forward_pre_hook(lambda _, args: (args[0][:, ::2],))
    look = llcompile.inspect(model, inputs(40))
    assert [m.call.sizes.length for m in look.mixers if m.call is not None] == [40, 40, 40, 20]
    assert [row["modules"] for row in look.to_dict()["groups"]] == ["0-2", "3"]
