"""The page of `llcompile.inspect`: what is on it, how its parts lead to each other, and that it is one file."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import llcompile
from llcompile.look import timings
from llcompile.look.findings import Findings
from llcompile.look.look import Look
from llcompile.look.module_tree import tree
from llcompile.passes import pipeline
from tests.helpers import small
from tests.helpers.html import Page
from tests.helpers.looked import Handmade, Mixed, inputs

pytest.importorskip("grandalf")
TEMPLATES = Path(llcompile.__file__).parent / "look" / "templates"
LAYERS = 8


class Branching(small.DeltaMixer):
    """Breaks the graph."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            x = x + 1
        return super().forward(x)


def trained() -> Look:
    model = small.Model([small.DeltaMixer() for _ in range(3)])
    llcompile.convert(model, small.ids(), verify=False)
    small.perturb(model)
    return llcompile.inspect(model, small.ids())


LOOKS: dict[str, Callable[[], Look]] = {
    "mixed": lambda: llcompile.inspect(Mixed(), inputs()),
    "equal layers": lambda: llcompile.inspect(small.Model([small.DeltaMixer() for _ in range(LAYERS)]), small.ids()),
    "graph breaks": lambda: llcompile.inspect(small.Model([Branching() for _ in range(4)]), small.ids()),
    "trained": trained,
    "nothing": lambda: llcompile.inspect(nn.Linear(3, 3), torch.zeros(2, 3)),
}
_seen: dict[str, tuple[Look, str, Page]] = {}


def seen(name: str) -> tuple[Look, str, Page]:
    """A look, its page as text, and as a tree."""
    if name not in _seen:
        from llcompile.look.page import page

        torch.manual_seed(0)
        look = LOOKS[name]()
        text = page(look)
        _seen[name] = look, text, Page(text)
    return _seen[name]


@pytest.mark.parametrize("name", LOOKS)
def test_it_is_one_file_whose_links_lead_somewhere(name: str) -> None:
    _, _, page = seen(name)
    elements = page.root.all()
    ids = [e.attributes["id"] for e in elements if "id" in e.attributes]
    assert len(set(ids)) == len(ids)
    links = [e.attributes[a] or "" for e in elements for a in ("href", "src") if a in e.attributes]
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)
    assert [link for link in links if not link.startswith("#")] == ["data:,"]
    assert len(page.root.all("script")) == len(page.root.all("style")) == 1
    code = page.root.all("script")[0].text + page.root.all("style")[0].text
    assert re.findall(r"https?:|//[a-z]+\.|@import|url\(|fetch|XMLHttp|import\(", code) == []
    named = {
        e.attributes[a] for e in elements for a in ("aria-labelledby", "aria-describedby", "for") if a in e.attributes
    }
    assert named <= set(ids)


@pytest.mark.parametrize("name", LOOKS)
def test_without_scripts_only_their_tools_are_missing(name: str) -> None:
    _, _, page = seen(name)
    hidden = {e.attributes.get("class") for e in page.root.all() if "hidden" in e.attributes}
    assert hidden <= {"search", "tools"}
    assert "search" in hidden
    scrolling = [e for e in page.root.all(class_="scroll") if e.tag == "div"]
    assert all(e.attributes.get("tabindex") == "0" and e.attributes.get("aria-label") for e in scrolling)
    assert all(e.attributes.get("type") == "button" for e in page.root.all("button"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_code_and_words_stand_out(scheme: str) -> None:
    """WCAG AA, on the page and on the ground of code."""
    style = (TEMPLATES / "page.css").read_text()
    light, dark = re.findall(r":root \{(.*?)\}", style, re.S)[:2]
    chosen = dict(re.findall(r"--([\w-]+): (#\w{6})", light + (dark if scheme == "dark" else "")))
    inks = ("ink", "quiet", "accent", "word", "string", "number", "called", "gone")
    assert {f"var(--{ink})" for ink in inks} <= set(re.findall(r"var\(--\w+\)", style))
    for ground in ("paper", "raised"):
        assert {
            ink: contrast(chosen[ink], chosen[ground]) for ink in inks if contrast(chosen[ink], chosen[ground]) < 4.5
        } == {}
    assert contrast(chosen["on-accent"], chosen["accent"]) >= 4.5
    assert contrast("#777777", "#ffffff") < 4.5 < contrast("#767676", "#ffffff")  # the control


def contrast(first: str, second: str) -> float:
    def luminance(color: str) -> float:
        parts = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
        red, green, blue = (p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    darker, lighter = sorted(map(luminance, (first, second)))
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("script", ["levels", "graphs", "search"])
def test_scripts_are_javascript(script: str) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node")
    subprocess.run([node, "--check", TEMPLATES / f"{script}.js"], check=True, timeout=60)


def test_equal_layers_are_one_row_and_one_article() -> None:
    look, text, page = seen("equal layers")
    assert len(look.mixers) == len(look.to_dict()["mixers"]) == LAYERS
    overview = page.id("overview")
    assert len(overview.all("tbody")) == 1
    (row,) = [r for r in overview.all("tr") if r.all("td")]
    cells = [cell.text.strip() for cell in row.all("td")]
    assert cells[:2] == [f"layers.0-{LAYERS - 1}", str(LAYERS)]
    assert cells[6] == f"{look.parameters:,}"
    assert len(page.root.all("article", class_="converted")) == 1
    assert len(text) < 1.1 * len(seen("one layer")[1])
    named = [e.text for e in page.id("mixer-0").all(data_find="module")]
    assert [f"layers.{i}" for i in range(LAYERS)] == named[1:], "each is found by its name"


LOOKS["one layer"] = lambda: llcompile.inspect(small.Model([small.DeltaMixer()]), small.ids())


def test_a_family_stands_together() -> None:
    look, _, page = seen("mixed")
    rows = [
        (r.attributes.get("class"), (r.all("td") or r.all("th"))[0].text.split()[0])
        for r in page.id("overview").all("tr")
    ]
    assert [first for kind, first in rows if kind == "family"] == ["Gated", "Scalar-decay", "Declined"]
    assert [first for kind, first in rows[1:] if kind is None] == ["layers.1,3", "layers.2", "layers.4"]
    assert [m.module for m in look.mixers] == ["layers.1", "layers.2", "layers.3", "layers.4"], (
        "the data keeps the order"
    )


def test_equal_modules_of_a_list_are_one_branch_though_others_stand_between() -> None:
    fates = {
        f"layers.{i}.mixer": [("converted", "SSD" if i % 3 else "DeltaNet", f"mixer-{i % 3 > 0}")] for i in range(7)
    }
    layers = nn.ModuleList(nn.ModuleDict({"mixer": nn.Linear(1, 1)}) for _ in range(7))
    (found,) = tree(nn.ModuleDict({"layers": layers}), fates).children
    assert [(b.name, b.count, b.children[0].fates[0][1]) for b in found.children] == [
        ("0,3,6", 3, "DeltaNet"),
        ("1-2,4-5", 4, "SSD"),
    ]


def test_the_share_of_new_parameters_is_at_the_top() -> None:
    from llcompile.look.page import page

    look, _, fresh = seen("equal layers")
    top = " ".join(fresh.root.all("header")[0].text.split())
    assert f"; {look.new_parameters}." in top
    assert f"% of the model's {look.own_parameters:,}" in look.new_parameters
    assert "large level weights" not in top
    many = tuple(replace(record, parameters=10**7) for record in look.converted)
    large = replace(look, converted=many, own_parameters=10**9)
    text = " ".join(Page(page(large)).root.all("header")[0].text.split())
    assert f"large level weights: {LAYERS} % more parameters" in text
    assert all(advice in str(large) for advice in large.advice)


def test_kernels_and_mixers_lead_to_each_other() -> None:
    look, _, page = seen("mixed")
    targets = lambda name: {e.attributes["href"] for e in page.id(name).all("a")}  # noqa: E731
    assert len(look.kernels) == 2
    assert targets("kernels-0") == {"#mixer-0"}
    assert targets("kernels-1") == {"#mixer-1"}
    assert "#kernels-0" in targets("mixer-0")
    assert "#kernels-1" in targets("mixer-1")
    assert not any("kernels" in target for target in targets("mixer-2"))  # declined
    assert {"#kernels-0", "#kernels-1"} <= targets("overview")


def test_what_search_finds() -> None:
    _, _, page = seen("mixed")
    found: dict[str, list[str]] = {}
    for element in page.root.all():
        kind = element.attributes.get("data-find")
        if kind:
            assert element.inside(id="main"), "the script looks there"
            found.setdefault(kind, []).append(" ".join(element.text.split()))
    assert {"module", "family", "reason", "operand", "operation", "kernels", "source", "untouched"} <= set(found)
    assert {"layers.1", "layers.2", "layers.3", "layers.4"} <= set(found["module"])
    assert any("loglinear_attention" in name for name in found["operation"])
    assert any(reason.startswith("not causal") for reason in found["reason"])
    assert "softmax attention" in found["untouched"][0]


def test_each_graph_has_its_tools() -> None:
    look, _, page = seen("mixed")
    drawn = sum(
        bool(d.boxes)
        for d in (
            d for g in (look.mixers[0], look.mixers[1], look.mixers[3]) for d in (g.drawing_before, g.drawing_after)
        )
    )
    graphs = page.root.all("div", class_="graph")
    assert len(graphs) == drawn == 5
    for graph in graphs:
        assert graph.parent is not None
        buttons = {b.attributes["data-do"] for b in graph.parent.all("button")}
        script = (TEMPLATES / "graphs.js").read_text()
        assert buttons == {"in", "out", "fit", "full", "enlarge"}
        assert all(re.search(rf"\b{name}\b[:,]", script) for name in buttons)
        assert all(b.text.strip() for b in graph.parent.all("button"))


def test_graph_breaks_are_said_as_dynamo_says_them() -> None:
    look, _, page = seen("graph breaks")
    (broken,) = look.breaks
    assert (broken.count, look.graphs) == (4, 8)
    line = next(n for n, text in enumerate(Path(__file__).read_text().splitlines(), 1) if "if x.sum() > 1e9" in text)
    assert f"test_page.py:{line} in forward" in broken.where
    cells = [cell.text for cell in page.id("breaks").all("td")]
    assert cells == ["4", broken.reason, broken.where]
    assert "None: the model is one graph." in seen("mixed")[2].id("breaks").text


def test_timings_are_of_this_run() -> None:
    model = small.Model([small.DeltaMixer()])
    start = time.perf_counter()
    look = llcompile.inspect(model, small.ids())
    wall = time.perf_counter() - start
    wholes = [t for t in look.timings if not t.within]
    assert 0.5 * wall < sum(t.seconds for t in wholes) <= wall
    assert all(t.seconds >= 0 for t in look.timings)
    passes = [step.__name__ for step in (*pipeline.LOOK, pipeline.attach, *pipeline.CHANGE)]
    assert [t.step for t in wholes] == ["trace", *passes, "show"]
    assert set(timings.STEPS) == {*passes, "trace", "show", "proofs of hand-written code"}
    assert all(t.what for t in look.timings)
    assert {t["step"] for t in look.to_dict()["timings"]} == {t.step for t in look.timings}


def test_a_slow_pass_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    def discover(session: object) -> int:
        time.sleep(0.3)
        return pipeline.discover(session)  # type: ignore[arg-type]

    monkeypatch.setattr(pipeline, "LOOK", tuple(discover if p.__name__ == "discover" else p for p in pipeline.LOOK))
    look = llcompile.inspect(small.Model([small.DeltaMixer()]), small.ids())
    assert next(t.seconds for t in look.timings if t.step == "discover") >= 0.3


def test_a_proof_is_timed_when_it_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from llcompile.passes import prove

    monkeypatch.setattr(prove, "_proofs", {})
    model = small.Model([small.DeltaMixer(), small.DeltaMixer()])
    first, again = (llcompile.inspect(model, small.ids()).timings for _ in range(2))
    (proof,) = [t for t in first if t.within == "prove"]
    assert (proof.step, proof.count) == ("proof of torch_chunk_gated_delta_rule", 1)
    assert 0 < proof.seconds <= next(t.seconds for t in first if t.step == "prove")
    assert [t for t in again if t.within == "prove"] == []


def test_what_a_compiled_kernel_took_is_on_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    from llcompile.look.page import page

    look = llcompile.inspect(small.Model([small.DeltaMixer()]), small.ids())
    file = look.kernels[0]
    assert file.seconds == {}
    monkeypatch.setattr(type(file), "_compile", lambda self, chip: [])
    file.resources("sm_90")
    file.resources("sm_90")
    assert list(file.seconds) == ["sm_90"]
    text = Page(page(look)).id("timings").text
    assert "compile for sm_90" in text
    assert file.name in text


class Around(nn.Module):
    """A mixer, softmax attention, and a projection beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer, self.head = Handmade(), nn.Linear(16, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mixer(x)
        x = nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        return self.head(x)


def test_the_cost_of_the_model() -> None:
    look = llcompile.inspect(Around(), inputs())  # [2, 40, 16]
    tokens = 2 * 40
    assert look.elsewhere.parameters == 2 * tokens * 16 * (48 + 1 + 32)
    assert look.elsewhere.activations == 2 * 2 * 40 * 40 * (16 + 16)
    assert look.elsewhere.unknown == ()
    at = look.cost.at(4 * 40)
    assert at["elsewhere"]["operations"] == 4 * look.elsewhere.parameters
    assert at["loglinear"] == look.costs[0].at(4 * 40)["loglinear"]
    assert look.to_dict()["cost"]["at"] == look.cost.at()


def test_what_is_elsewhere_is_what_a_run_counts() -> None:
    model = small.Model([small.Attention(), small.Attention()])
    with (
        FlopCounterMode(display=False) as counter,
        torch.no_grad(),
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        model(small.ids())
    found = llcompile.inspect(model, small.ids()).elsewhere
    assert found.parameters + found.activations == counter.get_total_flops() > 0
    assert found.activations > 0


def test_equal_mixers_cost_as_often_as_they_are() -> None:
    one, all_ = seen("one layer")[0], seen("equal layers")[0]
    assert all_.cost.at(4096)["loglinear"] == {k: LAYERS * v for k, v in one.cost.at(4096)["loglinear"].items()}
    assert one.elsewhere.parameters < all_.elsewhere.parameters < LAYERS * one.elsewhere.parameters  # one embedding


def test_a_declined_call_is_named_as_not_counted() -> None:
    from llcompile.look.page import page

    look = Findings(converted=seen("one layer")[0].converted, mixers=seen("one layer")[0].mixers)
    assert "Not counted" not in page(look)
    odd = type(look.elsewhere)(unknown=("odd_product",))
    text = Page(page(Findings(converted=look.converted, mixers=look.mixers, elsewhere=odd))).id("cost").text
    assert "Not counted: odd_product." in " ".join(text.split())


def test_trained_weights_are_tables_of_their_own_that_fold() -> None:
    _, _, page = seen("trained")
    tables = page.root.all("table", class_="heat")
    assert [t.all("caption")[0].text for t in tables] == ["layers.0", "layers.1", "layers.2"]
    assert [any(p.tag == "details" for p in _above(t)) for t in tables] == [False, True, True]


def _above(element: object) -> list[object]:
    parent = getattr(element, "parent", None)
    return [] if parent is None else [parent, *_above(parent)]


def test_operands_are_called_what_they_are() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"num_heads": 8, "head_dim": 16, "hidden_size": 64, "state_size": 16, "n_groups": 2, "vocab_size": 32}
    config = transformers.AutoConfig.for_model("mamba2", num_hidden_layers=1, chunk_size=32, use_cache=False, **sizes)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
    look = llcompile.inspect(model, torch.zeros(1, 40, dtype=torch.long))
    (mixer,) = look.mixers
    roles = {o.argument: o.roles for o in mixer.operands}
    assert (roles["C"], roles["B"], roles["hidden_states"]) == (("query",), ("key",), ("value",))
    assert (roles["dt"], roles["A"], roles["D"]) == (("value", "decay"), ("decay",), ("output",))
    assert "# key B: [B, T, G, K] = [1, 40, 2, 16] f32, view_1" in mixer.before
    for drawing in (mixer.drawing_before, mixer.drawing_after):
        titles = [box.title for box in drawing.boxes if box.kind == "outside"]
        assert {"query C", "key B", "value hidden_states"} <= set(titles)
        assert "value" not in titles
