"""The page in a real browser: nothing is asked for, nothing overflows, every figure is there, at a phone and at a desk.

Debian's `chromium` and the package `playwright` do it; without them the tests are skipped.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_page import full_summary

from trm_audit.report.page.html import render_html

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH (apt-get install chromium)")

VIEWS = [(390, "light"), (390, "dark"), (1280, "light"), (1280, "dark")]
OUTSIDE = """() => [...document.querySelectorAll("body *")].filter(element => {
    const box = element.getBoundingClientRect();
    if (!box.width || element.closest(".scroll") && !element.matches(".scroll")) return false;
    return box.left < -1 || box.right > document.documentElement.clientWidth + 1;
}).map(element => element.outerHTML.slice(0, 120))"""
FIGURES = """() => [...document.querySelectorAll("figure svg")].map(svg => {
    const box = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll("text")].map(text => text.getBoundingClientRect());
    const size = Math.min(...[...svg.querySelectorAll("text")].map(
        text => parseFloat(getComputedStyle(text).fontSize) * box.width / svg.viewBox.baseVal.width));
    const cut = texts.filter(t => t.left < box.left - 1 || t.right > box.right + 1 || t.bottom > box.bottom + 1).length;
    return {name: svg.closest("figure").id, width: box.width, height: box.height, size, cut};
})"""
CONTRAST = """() => {
    const luminance = colour => {
        const parts = colour.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
            .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
    };
    const paper = luminance(getComputedStyle(document.body).backgroundColor);
    return ["body", ".quiet", "figcaption span", "a", "svg text", ".warnings b"].map(name => {
        const style = getComputedStyle(document.querySelector(name));
        const ink = luminance(name.startsWith("svg") ? style.fill : style.color);
        return [name, (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05)];
    });
}"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render_html(full_summary()), "utf-8")
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as play:
        found = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


class Opened:
    """The page in a window, and what it asked for and complained about."""

    def __init__(self, browser: Any, file: Path, width: int = 1280, scheme: str = "light") -> None:
        self.events: list[str] = []
        self.page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page.on("console", lambda message: self.events.append(f"console: {message.text}"))
        self.page.on("pageerror", lambda error: self.events.append(f"error: {error}"))
        self.page.on("dialog", lambda dialog: self.events.append(f"dialog: {dialog.message}"))
        self.page.on("request", lambda request: self.events.append(f"request: {request.url[:200]}"))
        self.page.goto(file.as_uri())


@pytest.fixture(params=VIEWS, ids=lambda view: f"{view[0]}-{view[1]}")
def opened(request: pytest.FixtureRequest, browser: Any, file: Path) -> Iterator[Opened]:
    found = Opened(browser, file, *request.param)
    yield found
    found.page.close()


def test_nothing_is_asked_for_but_the_file_itself_and_nothing_is_complained_about(opened: Opened, file: Path) -> None:
    # WHEN everything folded is opened and every token is touched
    opened.page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    opened.page.locator(".peak").first.hover()
    opened.page.wait_for_timeout(50)
    # THEN the file was read, and that was all
    assert opened.events == [f"request: {file.as_uri()}"]


@pytest.mark.parametrize("unfolded", [False, True], ids=["folded", "unfolded"])
def test_nothing_overflows_the_window(opened: Opened, unfolded: bool) -> None:
    opened.page.evaluate(f"document.querySelectorAll('details').forEach(each => each.open = {str(unfolded).lower()})")
    widths = opened.page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert widths[0] <= widths[1]
    assert opened.page.evaluate(OUTSIDE) == []


def test_every_figure_is_there_and_its_text_is_legible_and_not_cut(opened: Opened) -> None:
    figures = opened.page.evaluate(FIGURES)
    assert len(figures) >= 19
    for figure in figures:
        assert figure["width"] >= 320, figure
        assert figure["height"] >= 150, figure
        assert figure["size"] >= 8, figure
        assert figure["cut"] == 0, figure


def test_text_stands_out_from_its_paper(opened: Opened) -> None:
    for name, contrast in opened.page.evaluate(CONTRAST):
        assert contrast >= 4.5, name


def test_light_and_dark_differ_and_colour_the_figures(browser: Any, file: Path) -> None:
    seen = []
    for scheme in ("light", "dark"):
        page = Opened(browser, file, 1280, scheme).page
        colours = "e => [getComputedStyle(document.body).backgroundColor, getComputedStyle(e).fill]"
        seen.append(page.locator("svg text").first.evaluate(colours))
        page.close()
    assert seen[0][0] != seen[1][0]
    assert seen[0][1] != seen[1][1]


def test_on_paper_the_ground_is_white_nothing_overflows_and_figures_stay_whole(browser: Any, file: Path) -> None:
    opened = Opened(browser, file, 794, "dark")
    opened.page.emulate_media(media="print")
    assert opened.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert opened.page.evaluate("getComputedStyle(document.querySelector('svg text')).fill") == "rgb(27, 30, 35)"
    widths = opened.page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert widths[0] <= widths[1]
    assert set(
        opened.page.evaluate("[...document.querySelectorAll('figure')].map(f => getComputedStyle(f).breakInside)")
    ) == {"avoid"}
    assert len(opened.page.pdf(format="A4")) > 10_000
    opened.page.close()


def test_a_shaded_token_is_marked_by_more_than_its_ground(browser: Any, file: Path) -> None:
    opened = Opened(browser, file)
    peak = (
        "e => [getComputedStyle(e).outlineStyle, getComputedStyle(e).borderBottomStyle, getComputedStyle(e).fontWeight]"
    )
    assert opened.page.locator(".peak").first.evaluate(peak) == ["solid", "double", "700"]
    assert opened.page.locator(".text .s6").first.evaluate("e => getComputedStyle(e).borderBottomStyle") == "solid"
    opened.page.close()
