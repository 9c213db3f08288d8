"""Equal rows of a report stand once, and its data keeps all of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

import llcompile
from llcompile import driver
from llcompile.errors import StrictError
from llcompile.folding import folded, grouped
from llcompile.options import Options
from llcompile.patterns.records import Certificate, Converted, Declined, GraphBreak, Untouched

PROOF = Certificate(1e-9, "float64", 3)
LAYER = Converted("model.layers.0.mixer", "DeltaNet", "none", "delta", "graph", PROOF, 10, 4, 8, 16, "linear", 4)


def layers(count: int) -> tuple[Converted, ...]:
    return tuple(replace(LAYER, module=f"model.layers.{i}.mixer") for i in range(count))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], []),
        ([""], ["(root)"]),
        (["a"], ["a"]),
        (["a.0.b", "a.1.b", "a.3.b", "c"], ["a.0-1,3.b", "c"]),
        (["a.2", "a.10", "a.1"], ["a.1-2,10"]),
        (["a.0", "b.1"], ["a.0", "b.1"]),
        (["a.0.x", "a.0.x"], ["a.0.x"]),
        (["a.0", "a.0.b", "a.1"], ["a.0-1", "a.0.b"]),
        (["1", "0"], ["0-1"]),
        ([f"a.{i}.b.{j}" for i in range(2) for j in range(3)], ["a.0-1.b.0-2"]),
        (["a.0.b.0", "a.0.b.1", "a.1.b.0"], ["a.0-1.b.0", "a.0.b.1"]),
    ],
)
def test_names(names: list[str], expected: list[str]) -> None:
    assert folded(names) == expected


def test_groups_come_in_the_order_of_their_first() -> None:
    assert grouped("abcacb", lambda c: c) == [("a", "a"), ("b", "b"), ("c", "c")]


def test_equal_mixers_are_one_row_of_the_text_and_all_of_the_data() -> None:
    worse = replace(LAYER, module="model.layers.64.mixer", certificate=Certificate(3e-7, "float64", 3))
    report = llcompile.Report(converted=(*layers(64), worse), graphs=1)
    (row,) = [line for line in str(report).splitlines() if "DeltaNet" in line]
    assert "model.layers.0-64.mixer" in row
    assert row.split()[1] == "65"
    assert "3.0e-07" in row, "the largest error of all"
    assert row.split()[-1] == "650"
    assert [c["module"] for c in report.to_dict()["converted"]] == [c.module for c in report.converted]


@pytest.mark.parametrize(
    "other",
    [{"heads": 8}, {"family": "GLA"}, {"parameters": 11}, {"origin": "function"}, {"level_weights": "static"}],
    ids=lambda change: next(iter(change)),
)
def test_mixers_that_differ_are_rows_of_their_own(other: dict[str, object]) -> None:
    odd = replace(LAYER, module="model.layers.2.mixer", **other)  # type: ignore[arg-type]
    report = llcompile.Report(converted=(*layers(2), odd))
    assert [("0-1" in line, ".2." in line) for line in str(report).splitlines()[3:]] == [(True, False), (False, True)]


def test_declined_and_untouched_are_folded_too() -> None:
    declined = [Declined(f"layers.{i}", "it is odd", "model.py:3", "even it", code="odd") for i in range(64)]
    notes = [replace(c, notes=("its decay is constant",)) for c in layers(3)]
    attention = [Untouched(f"layers.{i}.attention", "softmax attention") for i in range(64)]
    report = llcompile.Report(converted=tuple(notes), declined=tuple(declined), untouched=tuple(attention))
    shown = str(report)
    assert shown.count("it is odd") == shown.count("layers.0-63 ") == 1
    assert "left untouched, softmax attention: layers.0-63.attention" in shown
    assert "  model.layers.0-2.mixer: its decay is constant" in shown
    with pytest.raises(StrictError, match="64 linear-time mixers were not converted") as error:
        driver.check_strict(report, Options.parse({"strict": True}))
    assert str(error.value).count("it is odd") == str(error.value).count("  layers.0-63: it is odd") == 1


def test_graph_breaks_are_counted() -> None:
    one, other = GraphBreak("print", "model.py:3 in forward"), GraphBreak("sum", "model.py:9 in forward")
    report = llcompile.Report()
    for broken in (one, one, other, one):
        report = report.merged(llcompile.Report(graphs=1, breaks=(broken,)))
    assert report.breaks == (replace(one, count=3), other)
    assert "the graph breaks at model.py:3 in forward (3 times): print" in str(report)
    assert "the graph breaks at model.py:9 in forward: sum" in str(report)
