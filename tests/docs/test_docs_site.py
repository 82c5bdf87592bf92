"""The docs site, built strictly and read in a real browser: Debian's Chromium, driven by Playwright."""

import functools
import http.server
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin, urlparse

import pytest

import simmim
from simmim.cli import COMMANDS

for module in ("mkdocs", "material", "mkdocstrings_handlers.python"):
    pytest.importorskip(module, reason="needs the docs extra (make docs)")
api = pytest.importorskip("playwright.sync_api", reason="needs Playwright (pip install playwright)")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium)")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
FLAGS += ["--disable-component-update", "--disable-quic"]
BUILD = """
import sys
from mkdocs.commands.build import build
from mkdocs.config import load_config
build(load_config(sys.argv[1], docs_dir=sys.argv[2], site_dir=sys.argv[3]))
"""
PAGES = ["", "tutorial/", "commands/pretrain/", "python/", "method/", "troubleshooting/"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` builds it, in a folder of its own."""
    folder = tmp_path_factory.mktemp("docs")
    pages, built = folder / "pages", folder / "site"
    subprocess.run([sys.executable, ROOT / "tools" / "docs_site.py", pages], check=True, timeout=240)
    done = subprocess.run(
        [sys.executable, "-c", BUILD, ROOT / "mkdocs.yml", pages, built], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return built


class Parts(HTMLParser):
    """What a page links to, what it loads, and the anchors that it has."""

    def __init__(self, page: Path):
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag in ("img", "script", "iframe") and "src" in given:
            self.loads.append(given["src"])
        elif tag == "link" and given.get("rel") != "canonical":
            self.loads.append(given["href"])


@pytest.fixture(scope="module")
def parts(site: Path) -> dict[str, Parts]:
    """Parts of each page by its path on the site."""
    return {"/" + path.relative_to(site).as_posix(): Parts(path) for path in site.rglob("*.html")}


def test_every_link_leads_to_a_page_and_an_anchor(site, parts):
    broken = []
    for page, found in parts.items():
        if page == "/404.html":  # shown at any address
            continue
        for link in [*found.links, *found.loads]:
            if urlparse(link).scheme in ("http", "https", "mailto"):
                continue
            target, anchor = urldefrag(urljoin(page, link))
            place = unquote(target) + "index.html" * target.endswith("/")
            missing = not (site / place.lstrip("/")).is_file()
            if missing or (anchor and place in parts and unquote(anchor) not in parts[place].anchors):
                broken.append(f"{page}: {link}")
    assert len(parts) > 40
    assert broken == []


def test_no_page_names_a_file_elsewhere_to_load(parts):
    elsewhere = {load for found in parts.values() for load in found.loads if urlparse(load).netloc}
    assert elsewhere == set()


def test_every_command_and_every_public_name_has_its_place(parts):
    assert set(COMMANDS) <= {page.split("/")[2] for page in parts if page.startswith("/commands/")}
    names = {f"simmim.{name}" for name in simmim.__all__ if not name.startswith("_")}
    assert {name for name in names if not parts["/python/index.html"].anchors & aliases(name)} == set()


def aliases(name: str) -> set[str]:
    """The anchors that a public name may have: its own, or that of where it is defined."""
    value = getattr(simmim, name.removeprefix("simmim."))
    return {name, f"{value.__module__}.{value.__qualname__}"}


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    handler = functools.partial(QuietHandler, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with api.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
def test_pages_fit_the_window_and_ask_nothing_of_others(width, scheme, browser, address):
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page, requests, errors = context.new_page(), [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    wide = []
    for name in PAGES:
        page.goto(address + name, wait_until="networkidle")
        if page.evaluate("document.documentElement.scrollWidth") > width:
            wide.append(name)
        shown = page.evaluate("getComputedStyle(document.body).backgroundColor")
        lightness = sum(map(int, re.findall(r"\d+", shown)[:3])) / 3
        assert (lightness > 128) == (scheme == "light"), name
    context.close()
    assert wide == []
    assert [url for url in requests if not url.startswith((address, "data:"))] == []
    assert errors == []
    assert len(requests) > len(PAGES)


@needs_browser
@pytest.mark.parametrize(("words", "page"), [("accumulate-steps", "commands/"), ("out of memory", "troubleshooting/")])
def test_search_finds(words, page, browser, address):
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    tab, requests = context.new_page(), []
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(address, wait_until="networkidle")
    tab.locator(".md-search__input").click()
    tab.keyboard.type(words)
    # Results of half a word come first, so wait for the page; without it this raises.
    tab.wait_for_selector(f".md-search-result__link[href*='/{page}']", state="attached", timeout=30_000)
    context.close()
    assert [url for url in requests if not url.startswith((address, "data:", "blob:"))] == []
