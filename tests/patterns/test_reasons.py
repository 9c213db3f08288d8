"""Reasons of declined mixers: one table, stable codes, a page; and no place that declines with words of its own."""

from __future__ import annotations

import ast
import copy
import pickle
import re
import runpy
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import llcompile
from llcompile.errors import StrictError
from llcompile.patterns import reasons
from llcompile.patterns.reasons import TABLE, Group, Reason
from llcompile.report import Declined, Report
from llcompile.weights.withheld import withheld, withhold

ROOT = Path(__file__).parents[2]
ENTRIES = [entry for group in TABLE for entry in group.entries]
NAMES = {name: value for name, value in vars(reasons).items() if isinstance(value, Reason)}
# What takes a reason, as its first argument (`withhold` as its third).
GIVEN_TO = {
    "Rejection": 0,
    "CallRejection": 0,
    "CannotPlace": 0,
    "decline": 0,
    "because": 0,
    "withhold": 2,
    "give_up": 3,
}
SPEAKS = re.compile("|".join(("reasons", "GivenReason", "Declined", *GIVEN_TO)))
# Who makes one or unmakes it: the table, the record of a declined mixer, and what is saved with a module.
MAKERS = {"patterns/reasons.py", "patterns/records.py", "llcompile/weights/withheld.py"}


# -- the table


def test_codes_are_words_of_their_own() -> None:
    codes = [entry.code for entry in ENTRIES]
    assert len(codes) == len(set(codes)) > 80
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", code) for code in codes)
    sentences = [entry.sentence for entry in ENTRIES]
    assert len(sentences) == len(set(sentences))


def test_every_row_says_what_to_do() -> None:
    assert all(entry.hint and entry.sentence for entry in ENTRIES)
    assert not [entry.code for entry in ENTRIES if "{" in entry.hint or "`" in entry.sentence]


def test_every_constant_is_in_the_table_once() -> None:
    assert sorted(map(id, NAMES.values())) == sorted(map(id, ENTRIES))


def test_a_code_cannot_be_given_twice() -> None:
    group = Group("another", "")
    group.add("a-code-of-its-own", "it is new", "nothing")  # the control
    with pytest.raises(ValueError, match="not-causal"):
        group.add("not-causal", "it is new", "nothing")


def test_fields_are_filled_in() -> None:
    given = reasons.NOT_CAUSAL(output=3, input=5)
    assert (given.code, given.text) == ("not-causal", "not causal: output 3 depends on input 5")
    assert reasons.NEAR_A_FAMILY(error=0.0312).text == "agrees only to 3e-02 at w = 1"
    assert reasons.ANALYSIS_FAILED(error="KeyError: {x}").text.endswith("KeyError: {x}")


@pytest.mark.parametrize(
    "fields", [{}, {"output": 3}, {"output": 3, "input": 5, "length": 7}, {"output": 3, "inputs": 5}]
)
def test_a_wrong_field_is_an_error(fields: dict[str, int]) -> None:
    with pytest.raises(KeyError, match="not-causal"):
        reasons.NOT_CAUSAL(**fields)


def test_the_page_is_the_table() -> None:
    page = (ROOT / "docs" / "reasons.md").read_text()
    assert page == runpy.run_path(str(ROOT / "docs" / "make_reasons.py"))["page"](), "run python docs/make_reasons.py"
    assert re.findall(r"^\| `([a-z-]+)` \|", page, re.MULTILINE) == [entry.code for entry in ENTRIES]


# -- the places that decline


@dataclass
class Places:
    """What the code does with reasons.

    Args:
        used: names of constants that are given somewhere.
        wrong: what declines without a reason of the table, or fills it in wrongly.
    """

    used: set[str] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)

    def read(self, source: str, name: str) -> None:
        """Adds what one file does."""
        tree = ast.parse(source)
        called = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
        for node in ast.walk(tree):
            where = f"{name}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "reasons":
                self._use(node, called.get(id(node)), where)
            elif isinstance(node, ast.Call):
                self._call(node, where, name)

    def _use(self, node: ast.Attribute, call: ast.Call | None, where: str) -> None:
        entry = NAMES.get(node.attr)
        if entry is None:
            self.wrong += [] if node.attr == "BREAKS" else [f"{where}: no reason {node.attr}"]
            return
        self.used.add(node.attr)
        given = None if call is None else {keyword.arg for keyword in call.keywords}
        whole = given is None or call is None or call.args or (None not in given and given != entry.fields)
        if whole or not entry.fields.issuperset((given or set()) - {None}):
            self.wrong.append(f"{where}: the fields of {node.attr} are {sorted(entry.fields)}")

    def _call(self, node: ast.Call, where: str, file: str) -> None:
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        if name == "GivenReason" and file not in MAKERS:
            self.wrong.append(f"{where}: a reason that is not in the table")
        if name == "Declined" and file not in MAKERS:
            self.wrong.append(f"{where}: Declined.because has the reason")
        at = GIVEN_TO.get(name)
        if at is not None and at < len(node.args) and any(map(_is_text, ast.walk(node.args[at]))):
            parts = ast.walk(node.args[at])
            if not any(isinstance(part, ast.Attribute) and part.attr in NAMES for part in parts):
                self.wrong.append(f"{where}: {name} with words of its own")


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def sources() -> Iterator[tuple[str, str]]:
    for folder in ("llcompile", "passes", "patterns"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            name = file.relative_to(ROOT).as_posix()
            if not name.startswith(("llcompile/passes/", "llcompile/patterns/", "llcompile/kernels/")):
                source = file.read_text()
                if SPEAKS.search(source):
                    yield name, source


@pytest.fixture(scope="module")
def places() -> Places:
    found = Places()
    for name, source in sources():
        found.read(source, name)
    return found


def test_every_code_is_given_somewhere(places: Places) -> None:
    assert sorted(NAMES.keys() - places.used) == []


def test_nothing_declines_without_a_code(places: Places) -> None:
    assert places.wrong == []


@pytest.mark.parametrize(
    "line",
    [
        'raise Rejection("not causal", 3)',
        'raise Rejection(f"not causal: {output}", 3)',
        'site.decline("it is odd")',
        'site.decline(GivenReason("odd", "it is odd", ""))',
        'Declined("a", "it is odd", "here", code="odd")',
        'withheld.withhold(owner, "loglinear", "it is odd")',
        "raise Rejection(reasons.NOT_CASUAL(output=1, input=2))",
        "raise Rejection(reasons.NOT_CAUSAL(output=1))",
        "raise Rejection(reasons.NOT_CAUSAL)",
        "raise Rejection(reasons.STRICTLY_CAUSAL(output=1))",
    ],
)
def test_what_is_wrong_is_seen(line: str) -> None:
    found = Places()
    found.read(line, "passes/planted.py")
    assert found.wrong
    right = Places()
    right.read("raise Rejection(reasons.NOT_CAUSAL(output=1, input=2), 3)", "passes/planted.py")
    assert (right.wrong, right.used) == ([], {"NOT_CAUSAL"})


def test_a_record_has_a_code() -> None:
    with pytest.raises(TypeError, match="code"):
        Declined("layer", "it is odd", "model.py:3")  # type: ignore[call-arg]


def test_a_line_of_the_users_is_shown_whole() -> None:
    where = f"/home/{'deep/' * 40}model.py:3 in forward"
    report = llcompile.Report(declined=(Declined("layer", "it is odd", where, code="odd"),))
    assert "…" not in str(report)
    shown = "".join(line[str(report).splitlines()[2].index("where") :] for line in str(report).splitlines()[3:])
    assert "".join(where.split()) in "".join(shown.split())


def test_what_is_saved_with_a_module_has_no_class_of_ours() -> None:
    layer, given = nn.Linear(2, 2), reasons.OUTPUT_CHANGES(error=0.5, dtype="float32")
    withhold(layer, "loglinear", given)
    assert withheld(copy.deepcopy(layer), "loglinear") == given
    assert withheld(layer, "another") is None
    assert b"llcompile.patterns" not in pickle.dumps(layer)
    assert b"llcompile.patterns" in pickle.dumps(given)  # the control


# -- what a person and a program see


class Mixer(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.all, self.kind = nn.Linear(8, 24), kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.all(x).chunk(3, -1)
        scores = q @ k.mT
        if self.kind == "not-causal":
            return scores.tril(1) @ v
        if self.kind == "not-linear-in-query":
            return scores.relu().tril() @ v
        if self.kind == "sliding-window":
            return scores.tril().triu(-4) @ v
        if self.kind == "gradient-stopped":
            return scores.tril().detach() @ v
        if self.kind == "random":
            return F.dropout(scores.tril(), 0.5) @ v
        return scores.tril() @ v


KINDS = ("not-causal", "not-linear-in-query", "sliding-window", "gradient-stopped", "random")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({kind: Mixer(kind) for kind in (*KINDS, "plain")})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([layer(x) for layer in self.layers.values()], -1)


@pytest.fixture(scope="module")
def report() -> Report:
    torch.manual_seed(0)
    return llcompile.inspect(Model(), torch.randn(2, 20, 8)).report


def test_each_kind_has_its_code(report: Report) -> None:
    assert {d.module.rpartition(".")[2]: d.code for d in report.declined} == {kind: kind for kind in KINDS}
    assert [c.module for c in report.converted] == ["layers.plain"]  # the control


def test_a_report_shows_codes(report: Report) -> None:
    assert [d["code"] for d in report.to_dict()["declined"]] == [d.code for d in report.declined]
    shown = str(report)
    assert all(f"[{kind}]" in shown for kind in KINDS)


def test_strict_names_the_code() -> None:
    options = {"strict": True}
    with pytest.raises(StrictError, match=r"not linear in the query .*\[not-linear-in-query\]"):
        llcompile.convert(Mixer("not-linear-in-query"), torch.randn(1, 20, 8), options=options)


def test_a_page_and_a_look_have_the_code() -> None:
    pytest.importorskip("jinja2")
    look = llcompile.inspect(Mixer("not-linear-in-query"), torch.randn(1, 20, 8))
    assert look.mixers[0].code == look.declined[0].code == "not-linear-in-query"
    from llcompile.look.page import page

    assert "<code>not-linear-in-query</code>" in page(look)
    assert "<code>not-linear-in-query</code>" not in page(llcompile.inspect(Mixer("plain"), torch.randn(1, 20, 8)))
