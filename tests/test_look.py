"""What `llcompile.inspect` returns: the decisions of the real run, and what there is to see of them."""

from __future__ import annotations

import ast
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import llcompile
from llcompile import backend
from llcompile.errors import MissingLibraryError, OutputError, StrictError
from llcompile.kernels.levels import level
from llcompile.look.level_table import level_table
from llcompile.look.look import Look
from llcompile.look.mask import blocks
from llcompile.look.mixer_look import LevelTable
from llcompile.torch_internals import inner
from llcompile.weights import attachment
from tests.helpers import small
from tests.helpers.html import Page
from tests.helpers.looked import Handmade, Mixed, inputs


@pytest.fixture(scope="module")
def look() -> Look:
    torch.manual_seed(0)
    model = Mixed()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    look = llcompile.inspect(model, inputs())
    after = model.state_dict()
    assert list(after) == list(before), "a dry run changes nothing"
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    return look


@pytest.mark.parametrize("options", [None, {"levels": 3, "strict": True}])
def test_what_was_looked_at_is_converted_for_a_while(options: dict[str, object] | None) -> None:
    """As for MLIR: with the options of the look, and with nothing left behind."""
    model = small.Model([small.DeltaMixer()])
    seen = llcompile.inspect(model, small.ids(), options=options).subject
    assert seen is not None
    with seen.converted():
        assert [w.levels for _, _, w in attachment.attached(model)] == [3 if options else 17]
    assert not any(attachment.attached(model))


class Checkpointed(nn.Module):
    """Its mixers stand in the body of a higher-order call."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([small.DeltaMixer(), small.DeltaMixer()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return x


class OneLine(Handmade):
    """Two mixers in one line of one module."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return (q @ k.transpose(1, 2)).tril() @ v + (k @ q.transpose(1, 2)).tril() @ (2 * v)


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "mixed": lambda: (Mixed(), inputs()),
    "two mixers in a module": lambda: (small.Model([small.TwoMixers()]), small.ids()),
    "two mixers in a line": lambda: (OneLine(), inputs()),
    "in a checkpoint": lambda: (Checkpointed(), inputs()),
    "nothing linear": lambda: (small.Model([small.Attention()]), small.ids()),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if "module" in name else []) for name in MODELS]
)
def test_the_decisions_are_those_of_the_real_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = MODELS[name]()
    look = llcompile.inspect(model, x)
    calls: list[list[list[int]]] = []
    compile_graph = inner.compile_graph

    def watch(module: fx.GraphModule, *rest: Any) -> Any:
        graphs = [m.graph for m in module.modules() if isinstance(m, fx.GraphModule)]
        nodes = (node for graph in graphs for node in graph.nodes)
        operators = [n for n in nodes if str(n.target).startswith("llcompile.loglinear_attention")]
        calls.extend([list(a.meta["example_value"].shape) for a in n.args[:4]] for n in operators)
        return compile_graph(module, *rest)

    monkeypatch.setattr(inner, "compile_graph", watch)
    with pytest.warns(match="at the first compiled call") if look.converted else torch.no_grad():
        torch.compile(model, backend="loglinear", options={"inner": "eager"})(x)
    real = backend.last_report()
    assert (look.converted, look.declined, look.untouched) == (real.converted, real.declined, real.untouched)
    seen = [
        [[s.batch, s.length, s.groups, s.key_dim]] * 2
        + [[s.batch, s.length, s.heads, s.value_dim], [s.batch, s.length, s.heads, mixer.call.levels]]
        for mixer in look.mixers
        if mixer.call is not None and (s := mixer.call.sizes)
    ]
    assert seen == calls
    assert len(look.mixers) == len(look.converted) + len(look.declined)
    assert len(look.costs) == len(look.converted) == len([m for m in look.mixers if m.after])


def test_a_look_prints_as_the_report(look: Look) -> None:
    """And behind it what is kept of the past, where something was converted."""
    report, rest = str(look.report), str(look).removeprefix(str(look.report))
    assert str(look).startswith(report)
    assert ("kept per sequence" in rest) == bool(look.converted)
    assert "3 of 4 linear-time mixers" in str(look)


def test_regions_are_code_with_shapes(look: Look) -> None:
    called, written, _, missed = look.mixers
    assert [m.module for m in look.mixers] == ["layers.1", "layers.2", "layers.3", "layers.4"]
    assert "torch_chunk_gated_delta_rule(query=" in called.before
    assert "# query: [B, T, G, K] = [2, 40, 2, 8] f32" in called.before
    assert "# decay: [B, T, 1] = [2, 40, 1] f32" in written.before
    assert "masked_fill" in written.before
    assert "looked.py" in written.before
    for mixer in (called, written):
        assert "torch.ops.llcompile.loglinear_attention(" in mixer.after
        assert "self.loglinear.weight" in mixer.after
        assert "masked_fill" not in mixer.after
        added = [line for line in mixer.diff.splitlines() if line.startswith("+") and "loglinear_attention(" in line]
        assert len(added) == 1
    assert missed.after == missed.diff == ""
    assert "triu(2)" in missed.before
    assert look.graph_before.count("# layers.") == look.graph_after.count("# layers.") == 4
    assert "# unchanged: not causal" in look.graph_after


def test_the_source_is_what_the_user_wrote(look: Look) -> None:
    source = look.mixers[1].source
    assert source is not None
    assert Path(source.file).name == "looked.py"
    marked = [source.lines[n - source.first].strip() for n in source.marked]
    assert any(line.startswith("total =") for line in marked)
    assert marked[-1].startswith("return (q @ k")


def test_drawings_hold_together(look: Look) -> None:
    for mixer in look.mixers:
        for drawing in (mixer.drawing_before, mixer.drawing_after):
            names = [box.name for box in drawing.boxes]
            assert len(set(names)) == len(names)
            assert {end for edge in drawing.edges for end in edge} <= set(names)
        assert any(box.kind == "inside" for box in mixer.drawing_before.boxes)
    assert any(box.title == "loglinear_attention" for box in look.mixers[0].drawing_after.boxes)


def test_a_loop_is_drawn_line_by_line() -> None:
    class Loop(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            state, out = torch.zeros(q.shape[0], 8, 8), []
            for t in range(q.shape[1]):
                state = state + k[:, t, :, None] * v[:, t, None]
                out.append((q[:, t, :, None] * state).sum(1))
            return torch.stack(out, 1)

    (mixer,) = llcompile.inspect(Loop(), *torch.randn(3, 2, 12, 8)).mixers
    inside = [box for box in mixer.drawing_before.boxes if box.kind == "inside"]
    assert len(mixer.before.splitlines()) > 12 * 4
    assert len(inside) <= 4
    assert sum(box.count for box in inside) > 12 * 4


def test_a_model_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = small.Model([small.DeltaMixer(1 << 14)], width=1 << 14)
    look = llcompile.inspect(model, small.ids().to("meta"))
    assert len(look.converted) == 1
    assert all(parameter.is_meta for parameter in model.parameters())
    assert look.mixers[0].table is not None
    assert look.mixers[0].table.identity


def test_level_weights_as_a_table() -> None:
    model, ids = small.Model([small.DeltaMixer()]), small.ids()
    llcompile.convert(model, ids)
    small.perturb(model)
    table = llcompile.inspect(model, ids).mixers[0].table
    assert table is not None
    assert not table.identity
    weights = model.layers[0].loglinear
    assert (len(table.mean), len(table.mean[0])) == (weights.heads, weights.levels)
    x = torch.randn(1, 4096, weights.in_features, generator=torch.Generator().manual_seed(7))
    w = weights(x)[0].detach()
    torch.testing.assert_close(torch.tensor(table.mean), w.mean(0), rtol=0.25, atol=0.25)
    assert level_table(weights.to("meta"), fresh=False) == LevelTable()


def test_kernels_are_one_file_for_each_kind_of_call(look: Look) -> None:
    assert [kernels.modules for kernels in look.kernels] == [("layers.1", "layers.3"), ("layers.2",)]
    for kernels in look.kernels:
        names = {node.name for node in ast.parse(kernels.source).body if isinstance(node, ast.FunctionDef)}
        assert {"chunk_state", "output"} <= names
        assert kernels.name.isidentifier()
        assert kernels.sources["cuda"] == kernels.source
        assert "backend='hip'" in kernels.sources["hip"]
        assert "#include <ATen/Parallel.h>" in kernels.sources["cpu"]
    doubled = llcompile.inspect(Handmade().double(), inputs().double()).kernels[0]
    assert doubled.source == ""
    assert "float64" in doubled.problem
    assert doubled.sources.keys() == {"cpu"}


def test_what_the_compiler_of_this_machine_makes(look: Look) -> None:
    from llcompile.kernels.cpp import compiler

    if compiler.unsupported() is not None or shutil.which("g++") is None:
        pytest.skip("needs g++ on Linux or macOS")
    kernels = look.kernels[1]
    (report,) = kernels.resources("cpu")
    assert report.path.read_bytes()[:4] in (b"\x7fELF", b"\xcf\xfa\xed\xfe")
    assert report.size == report.path.stat().st_size > 10_000
    assert "-O3" in report.flags


@pytest.mark.slow
def test_what_kernels_take_on_a_chip_that_is_not_there(look: Look) -> None:
    pytest.importorskip("triton")
    kernels = look.kernels[1]
    taken = kernels.resources("sm_90")
    assert {report.kernel for report in taken} >= {"chunk_state", "output"}
    assert all(0 < report.registers <= 255 for report in taken)
    assert kernels.compiled == {"sm_90": taken}


def test_sizes_that_vary_keep_their_letters() -> None:
    x = inputs()
    torch._dynamo.mark_dynamic(x, 1)
    (mixer,) = llcompile.inspect(Handmade(), x).mixers
    assert mixer.call is not None
    assert mixer.call.sizes.length == 40
    assert "= torch.ops.llcompile.loglinear_attention(" in mixer.after
    value = next(line for line in mixer.before.splitlines() if "total" in line)
    assert re.match(r"total: \[2, s\d+, 1\] f32 = ", value)


def test_costs_and_dict(look: Look) -> None:
    assert [cost.module for cost in look.costs] == ["layers.1", "layers.2", "layers.3"]
    at = look.costs[0].at(1 << 16)
    assert at["loglinear"]["operations"] > at["linear"]["operations"] > 0
    assert "log2(T/C)" in str(look.costs[0])
    found = json.loads(json.dumps(look.to_dict(), default=str))
    assert [mixer["fate"] for mixer in found["mixers"]] == ["converted", "converted", "converted", "declined"]
    assert found["mixers"][0]["cost"]["values"]["K"] == 8
    assert len(found["converted"]) == 3


@pytest.mark.parametrize("tokens", [1, 2, 16])
def test_blocks_tile_the_mask(tokens: int) -> None:
    seen: dict[tuple[int, int], int] = {}
    for block in blocks(tokens):
        for t in range(block.row, block.row + block.size):
            for s in range(block.column, block.column + block.size):
                assert (t, s) not in seen
                seen[t, s] = block.level
    assert seen == {(t, s): level(t, s) for t in range(tokens) for s in range(t + 1)}


def test_the_page_is_one_file(look: Look, tmp_path: Path) -> None:
    pytest.importorskip("grandalf")
    path = look.to_html(tmp_path / "page.html")
    text = path.read_text()
    page = Page(text)
    assert len(page.root.all("script")) == 1  # what stands in the user's source is escaped
    names = ["overview", "cost", "breaks", "mixer-0", "mixer-1", "mixer-2", "untouched", "kernels", "timings"]
    assert [article.attributes["id"] for article in page.root.all("article")] == names
    for words in ("layers.3", "not causal: output", "softmax attention", "chunk_state"):
        assert words in text
    assert list(tmp_path.iterdir()) == [path]


def test_a_page_without_mixers(tmp_path: Path) -> None:
    pytest.importorskip("grandalf")
    look = llcompile.inspect(nn.Linear(3, 3), torch.zeros(2, 3))
    assert "No linear-time mixer was found" in look.to_html(tmp_path / "page.html").read_text()


def test_a_page_needs_its_libraries(look: Look, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llcompile.look.page._LIBRARIES", ("jinja2", "no_such_library"))
    with pytest.raises(MissingLibraryError, match=r"needs no_such_library: pip install 'llcompile\[html\]'"):
        look.to_html(tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["missing/page.html", "."])
def test_a_page_that_cannot_be_written(look: Look, tmp_path: Path, place: str) -> None:
    pytest.importorskip("grandalf")
    with pytest.raises(OutputError, match="cannot write"):
        look.to_html(tmp_path / place)
    assert list(tmp_path.iterdir()) == []


def test_what_stood_there_stays_when_writing_fails(look: Look, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("grandalf")
    path = tmp_path / "page.html"
    path.write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OutputError, match="No space left"):
        look.to_html(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_graph_break_is_named() -> None:
    class Broken(small.DeltaMixer):
        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 1e9:
                x = x + 1
            return super().forward(x)

    look = llcompile.inspect(small.Model([Broken()]), small.ids())
    assert look.graphs == 2
    (broken,) = look.breaks
    assert "branches on the values" in broken.reason
    assert "test_look.py" in broken.where
    assert broken.where in str(look)


def test_a_model_that_becomes_no_graph() -> None:
    class Hidden(nn.Module):
        @torch.compiler.disable
        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    for seen in (llcompile.inspect(Hidden(), torch.zeros(3)), llcompile.convert(Hidden(), torch.zeros(3))):
        assert seen.graphs == 0
        (broken,) = seen.breaks
        assert re.search(r"test_look.py:\d+ in forward", broken.where)
        assert "Dynamo makes no graph of Hidden" in str(seen)
    with pytest.raises(StrictError, match="Dynamo makes no graph of Hidden"):
        llcompile.convert(Hidden(), torch.zeros(3), options={"strict": True})


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_network_of_torch(kind: type[nn.RNNBase]) -> None:
    """Dynamo makes no graph of it: the report says so, also beside layers that have mixers."""
    network = kind(16, 16, batch_first=True)
    assert [u.kind.split()[0] for u in llcompile.inspect(network, torch.zeros(2, 9, 16)).untouched] == ["recurrent"]

    class Mixed(small.DeltaMixer):
        def __init__(self) -> None:
            super().__init__()
            self.network = nn.Sequential(kind(16, 16, batch_first=True))

        def forward(self, x: Tensor) -> Tensor:
            return self.network(super().forward(x))[0]

    look = llcompile.inspect(small.Model([Mixed()]), small.ids())
    assert [c.module for c in look.converted] == ["layers.0"]
    assert [(u.module, u.kind.split(" (")[0]) for u in look.untouched] == [("layers.0.network.0", "recurrent network")]
