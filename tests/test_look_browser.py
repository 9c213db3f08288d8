"""The page of `llcompile.inspect` in a real browser: both colour schemes, narrow, by keyboard, no errors.

With LLCOMPILE_SCREENSHOTS=DIR the screenshots are kept there, to be looked at.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import llcompile
from tests.helpers import small
from tests.helpers.looked import Mixed, inputs

pytest.importorskip("grandalf")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on this machine"),
]


class Trained(Mixed):
    """With level weights that are not 1 in its known functions."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[4] = nn.Identity()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    torch.manual_seed(0)
    fresh = llcompile.inspect(Mixed(), inputs())
    model = Trained()
    llcompile.convert(model, inputs())
    small.perturb(model)
    trained = llcompile.inspect(model, inputs())
    return {"fresh": fresh.to_html(folder / "fresh.html"), "trained": trained.to_html(folder / "trained.html")}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as p:
        started = p.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield started
        started.close()


def opened(browser: Any, path: Path, scheme: str = "light", width: int = 1440) -> tuple[Any, list[str]]:
    """The page, and everything that went wrong or went out."""
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 1000})
    page, wrong = context.new_page(), []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda r: wrong.append(r.url) if not r.url.startswith(("file:", "data:")) else None)
    page.goto(path.as_uri())
    return page, wrong


@pytest.mark.parametrize("width", [1440, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["fresh", "trained"])
def test_it_opens_and_fits(browser: Any, pages: dict[str, Path], name: str, scheme: str, width: int) -> None:
    page, wrong = opened(browser, pages[name], scheme, width)
    assert wrong == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "it scrolls sideways as a whole"
    kept = os.environ.get("LLCOMPILE_SCREENSHOTS")
    if kept:
        page.screenshot(path=f"{kept}/{name}-{scheme}-{width}.png", full_page=True)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_what_is_behind_them(browser: Any, pages: dict[str, Path], scheme: str) -> None:
    page, _ = opened(browser, pages["trained"], scheme)
    ratio = """(selector) => {
      const luminance = (color) => {
        const canvas = new OffscreenCanvas(1, 1).getContext("2d");
        canvas.fillStyle = color;
        canvas.fillRect(0, 0, 1, 1);
        const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((c) => c / 255)
          .map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      const style = getComputedStyle(document.querySelector(selector));
      const [a, b] = [luminance(style.fill !== "rgb(0, 0, 0)" ? style.fill : style.color),
                      luminance(getComputedStyle(document.body).backgroundColor)].sort((x, y) => y - x);
      return (a + 0.05) / (b + 0.05);
    }"""
    for selector in ("h1", "p", ".quiet", "nav a", "th", "figcaption", ".reason, .facts dt"):
        assert page.evaluate(ratio, selector) >= 4.5, selector  # WCAG AA


def test_by_keyboard_alone(browser: Any, pages: dict[str, Path]) -> None:
    page, wrong = opened(browser, pages["trained"])
    focused = lambda: page.evaluate("document.activeElement.className.baseVal ?? document.activeElement.className")  # noqa: E731
    page.keyboard.press("Tab")
    assert focused() == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"

    for _ in range(120):
        page.keyboard.press("Tab")
        if focused() == "mask":
            break
    readout = page.locator(".readout").first
    assert readout.text_content() == "Level 0: token 0 reads itself, with weight 1."
    page.keyboard.press("ArrowDown")
    assert "Level 1: queries 1" in readout.text_content()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    assert readout.text_content().startswith("Level 3: queries 4 to 7 read the state of tokens 0 to 3")

    for _ in range(5):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.dataset.head") == "0":
            break
    page.keyboard.press("Enter")
    pressed = page.locator("button[aria-pressed=true]")
    assert pressed.count() == 1
    weight = float(pressed.get_attribute("data-weights").split()[3])
    assert f"weight {weight:.3g}".rstrip("0") in readout.text_content()

    details = page.locator("article details > summary", has_text="Diff").first
    details.focus()
    page.keyboard.press("Enter")
    assert details.evaluate("e => e.parentElement.open")
    assert wrong == []


def test_pointing_at_a_block_says_what_it_is(browser: Any, pages: dict[str, Path]) -> None:
    page, _ = opened(browser, pages["fresh"])
    mask = page.locator(".mask").first
    mask.locator("rect[data-level='5']").hover()
    text = page.locator(".readout").first.text_content()
    assert text == "Level 5: queries 16 to 31 read the state of tokens 0 to 15, with weight 1."
    assert "level 5" in mask.locator("rect[data-level='5'] title").text_content()


def test_a_module_leads_to_its_mixer(browser: Any, pages: dict[str, Path]) -> None:
    page, _ = opened(browser, pages["fresh"])
    page.locator("nav .fate", has_text="not causal").click()
    article = page.locator("article:target")
    assert article.locator("h2").text_content() == "A near miss"
    assert "not causal: output" in article.locator(".reason").text_content()


def test_a_graph_zooms_and_pans(browser: Any, pages: dict[str, Path]) -> None:
    page, wrong = opened(browser, pages["fresh"])
    graph = page.locator("#mixer-0 .graph").nth(1)
    width = lambda: graph.locator("svg").evaluate("e => e.getBoundingClientRect().width")  # noqa: E731
    shown = page.locator("#mixer-0 figure").nth(1).locator("output")
    graph.focus()
    before = width()
    page.keyboard.press("+")
    assert width() == pytest.approx(1.25 * before, rel=0.01)
    page.keyboard.press("-")
    assert width() == pytest.approx(before, rel=0.01)
    page.keyboard.press("1")
    assert shown.text_content() == "100 %"
    page.keyboard.press("0")
    fits = "e => e.scrollWidth <= e.clientWidth + 1 && e.scrollHeight <= e.clientHeight + 1"
    assert graph.evaluate(fits)

    for _ in range(6):
        page.keyboard.press("+")
    assert not graph.evaluate(fits)
    box = graph.bounding_box()
    x, y = box["x"] + 200, box["y"] + 100
    at = graph.evaluate("e => [e.scrollLeft, e.scrollTop]")
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x - 40, y - 30)
    page.mouse.up()
    assert graph.evaluate("e => [e.scrollLeft, e.scrollTop]") == pytest.approx([at[0] + 40, at[1] + 30], abs=1)
    page.mouse.move(x, y)
    assert graph.evaluate("e => [e.scrollLeft, e.scrollTop]") == pytest.approx([at[0] + 40, at[1] + 30], abs=1)

    place = f"""() => {{
      const box = document.querySelectorAll("#mixer-0 .graph svg")[1].getBoundingClientRect();
      return [({x} - box.left) / box.width, ({y} - box.top) / box.height];
    }}"""
    wider = "w => document.querySelectorAll('#mixer-0 .graph svg')[1].getBoundingClientRect().width > w"
    fixed, before = page.evaluate(place), width()
    page.keyboard.down("Control")
    page.mouse.wheel(0, -60)
    page.keyboard.up("Control")
    page.wait_for_function(wider, arg=before, timeout=5000)
    assert page.evaluate(place) == pytest.approx(fixed, abs=0.01), "what is below the pointer stays there"

    large = page.locator("#mixer-0 figure").nth(1).locator("[data-do=enlarge]")
    narrow = graph.bounding_box()["width"]
    large.click()
    assert graph.bounding_box()["width"] > 1.5 * narrow
    assert large.get_attribute("aria-pressed") == "true"
    assert wrong == []


def test_search(browser: Any, pages: dict[str, Path]) -> None:
    page, wrong = opened(browser, pages["fresh"])
    hits, status = page.locator(".search li"), page.locator(".search [role=status]")
    page.keyboard.press("/")
    page.keyboard.type("layers.3")
    assert "layers.3" in hits.first.text_content()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.textContent") == "layers.3"
    assert page.evaluate("document.activeElement.closest('details').open"), "what was folded is open"

    page.keyboard.press("/")
    page.keyboard.type("masked_fill(")
    assert hits.count() > 0
    hits.last.locator("a").click()
    assert page.evaluate("getSelection().toString()") == "masked_fill("

    page.locator("#search").fill("loglinear_attention")
    operation = page.locator(".search li", has_text="operation").first
    assert "Gated DeltaNet, After" in operation.text_content()
    operation.locator("a").click()
    assert page.locator("g.found").count() == 1

    page.locator("#search").fill("no such thing")
    assert status.text_content() == "Nothing found."
    assert hits.count() == 0
    page.keyboard.press("Escape")
    assert page.locator("#search").input_value() == status.text_content() == ""
    assert wrong == []


def test_without_scripts_it_can_be_read(browser: Any, pages: dict[str, Path]) -> None:
    context = browser.new_context(java_script_enabled=False, viewport={"width": 1440, "height": 1000})
    page = context.new_page()
    page.goto(pages["fresh"].as_uri())
    assert not page.locator(".search").is_visible()
    assert not page.locator(".tools").first.is_visible()
    page.locator("summary", has_text="Code of the region").first.click()
    assert page.locator("section .code").first.is_visible()
    assert page.locator(".graph svg").first.is_visible()
