"""The report in a real browser: Debian's Chromium, driven by Playwright."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import simmim
from simmim.report.page import ReportConfig, report

from .test_report import TINY, falling, write_run

api = pytest.importorskip("playwright.sync_api", reason="needs Playwright (pip install playwright)")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium)")
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
FLAGS += ["--disable-component-update", "--disable-quic"]

CONTRAST = """() => {
  const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => {
    const linear = (v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = channels(colour).map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      if ((channels(colour)[3] ?? 1) > 0) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const texts = [...document.body.querySelectorAll(":not(script, style)")].filter((e) =>
    e.checkVisibility() && [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim()));
  return texts.map((e) => {
    const style = getComputedStyle(e), ink = e instanceof SVGElement ? style.fill : style.color;
    const [a, b] = [light(ink), light(behind(e))].sort((x, y) => y - x);
    return [(a + 0.05) / (b + 0.05), e.tagName + ": " + e.textContent.slice(0, 30)];
  });
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with api.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, tuned: dict[str, Path]) -> dict[str, Path]:
    """A real run with labels, a collapsed run, three runs side by side, and a fine-tuning of each task."""
    folder = tmp_path_factory.mktemp("pages")
    run = simmim.pretrain(**TINY | {"steps": 30, "picture_every_steps": 10}, out=str(folder / "run"))
    rng = np.random.default_rng(0)
    arrays = {f"x_{part}": rng.integers(0, 256, (12, 32, 32, 3), np.uint8) for part in ("train", "test")}
    labels = {f"y_{part}": np.arange(12) % 3 for part in ("train", "test")}
    np.savez(folder / "set.npz", **arrays, **labels)  # type: ignore[arg-type]
    rows = [*falling()[:-1], {"loss": 0.2, "effective_rank": 1.2, "feature_std": 0.01}]
    name = "<script>alert(1)</script>"
    dead = write_run(folder / name, rows)
    several = tuple(str(facts.run.path) for facts in (dead, write_run(folder / "b", falling(), seed=1)))
    made = {
        "labels": ReportConfig(
            runs=(str(run.path),),
            labels=str(folder / "set.npz"),
            data="demo",
            images=60,
            out=str(folder / "labels.html"),
        ),
        "collapsed": ReportConfig(runs=(several[0],), out=str(folder / "collapsed.html")),
        "several": ReportConfig(runs=(str(run.path), *several), out=str(folder / "several.html")),
        "tuned": ReportConfig(runs=tuple(map(str, tuned.values())), out=str(folder / "tuned.html")),
    }
    return {kind: report(config) for kind, config in made.items()}


@pytest.mark.parametrize("kind", ["labels", "collapsed", "several", "tuned"])
@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (390, "dark"), (390, "light")])
def test_a_page_is_readable_and_asks_for_nothing(
    browser: Any, pages: dict[str, Path], kind: str, width: int, scheme: str, tmp_path: Path
) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(dialog.message) or dialog.dismiss())
    page.on("request", lambda request: said.append(request.url) if not request.url.startswith("data:") else None)
    page.goto(pages[kind].as_uri())
    assert said == [pages[kind].as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    weak = [text for contrast, text in page.evaluate(CONTRAST) if contrast < 4.5]
    assert not weak
    page.screenshot(path=str(tmp_path / f"{kind}-{width}-{scheme}.png"), full_page=True)
    page.close()


def test_numbers_beside_a_chart_are_whole(browser: Any, tmp_path: Path) -> None:
    facts = write_run(tmp_path / "long", falling(100_000))
    page = browser.new_page()
    page.goto(report(ReportConfig(runs=(str(facts.run.path),))).as_uri())
    texts = page.evaluate("""() => [...document.querySelectorAll(".chart")].flatMap((chart) => {
      const frame = chart.querySelector("svg").getBoundingClientRect();
      return [...chart.querySelectorAll(".ticks text")].map((text) => {
        const box = text.getBoundingClientRect();
        return [text.textContent, box.left >= frame.left && box.right <= frame.right];
      });
    })""")
    page.close()
    assert "100,000" in [text for text, _ in texts]
    assert [text for text, whole in texts if not whole] == []


def test_charts_are_read_and_zoomed_by_pointer_and_by_keys(browser: Any, pages: dict[str, Path]) -> None:
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.goto(pages["labels"].as_uri())
    figure = page.locator(".chart").first
    svg, reading = figure.locator("svg"), figure.locator(".reading")

    def last_step() -> int:
        return int(figure.locator(".ticks text[text-anchor=middle]").last.text_content().replace(",", ""))

    svg.hover()
    assert re.fullmatch(r"step \d+: loss [\d.]+", reading.inner_text())
    box = svg.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.2, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 50)
    page.mouse.up()
    assert last_step() < 20
    svg.dblclick()
    assert last_step() == 30
    page.mouse.move(0, 0)
    figure.focus()
    page.keyboard.press("ArrowLeft")
    assert reading.inner_text().startswith("step 29:")
    page.keyboard.press("+")
    assert figure.locator("polyline").count() == 1 and last_step() <= 30
    page.keyboard.press("0")
    assert last_step() == 30
    page.close()


def test_each_slider_shows_the_pictures_of_a_step(browser: Any, pages: dict[str, Path]) -> None:
    page = browser.new_page()
    page.goto(pages["labels"].as_uri())
    assert page.locator(".panels").count() == 2
    for number, first in enumerate(("10", "0")):  # reconstructions; features, which are drawn before training too
        panels = page.locator(".panels").nth(number)
        assert panels.locator("img:visible").get_attribute("data-step") == "30"
        panels.locator("input").focus()
        page.keyboard.press("Home")
        assert panels.locator("img:visible").get_attribute("data-step") == first
        assert panels.locator("output").inner_text() == first
    page.close()


def test_the_page_says_all_without_its_script(browser: Any, pages: dict[str, Path]) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(pages["labels"].as_uri())
    assert page.locator("polyline").count() >= 3
    assert page.locator(".panels img:visible").count() == 2  # the last of each kind
    context.close()


def test_the_map_shows_images_and_finds_names(browser: Any, pages: dict[str, Path]) -> None:
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.goto(pages["labels"].as_uri())
    figure = page.locator(".map")
    name = figure.locator(".name")
    assert figure.locator("circle").count() == 60 and not name.inner_text()
    figure.locator("circle").nth(59).hover()  # the last lies over the others
    shown = name.inner_text()
    assert shown.endswith(".webp")
    figure.locator("input").fill(shown[-12:])
    assert 0 < figure.locator("circle:not(.faint)").count() < 60
    figure.locator("input").fill("no such name")
    assert name.inner_text() == "no name has no such name" and figure.locator("circle:not(.faint)").count() == 0
    page.close()


def test_a_confusion_matrix_is_read_by_pointer_and_by_keys(browser: Any, pages: dict[str, Path]) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 900})
    page.goto(pages["tuned"].as_uri())
    figure = page.locator(".matrix").first
    reading = figure.locator(".reading")
    figure.focus()
    page.keyboard.press("ArrowDown")
    assert re.fullmatch(r"<script>alert\(1\)</script> is right: \d+ of 10 images \([\d.]+ %\)", reading.inner_text())
    page.keyboard.press("ArrowDown")
    assert reading.inner_text().startswith("b & 'b' is taken for <script>alert(1)</script>: ")
    drawn = figure.locator("svg").bounding_box()
    figure.locator("svg").hover(position={"x": drawn["width"] - 12, "y": drawn["height"] - 12})
    assert reading.inner_text().startswith("c is right: ")
    page.close()


def test_a_table_of_classes_is_sorted_by_its_headings(browser: Any, pages: dict[str, Path]) -> None:
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.goto(pages["tuned"].as_uri())
    table = page.locator("table.classes").nth(1)  # of the segmentation
    column = [heading.inner_text().split()[0] for heading in table.locator("thead th").all()].index("pixels")

    def counts() -> list[int]:
        cells = [row.locator("td").nth(column - 1).inner_text() for row in table.locator("tbody tr").all()]
        return [int(cell.replace(",", "")) for cell in cells]

    table.get_by_role("button", name="pixels").focus()
    page.keyboard.press("Enter")
    assert counts() == sorted(counts())
    page.keyboard.press("Enter")
    assert counts() == sorted(counts(), reverse=True)
    assert table.locator("[aria-sort=descending]").inner_text().startswith("pixels")
    page.close()
