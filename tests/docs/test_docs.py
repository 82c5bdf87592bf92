"""Pages of docs/ agree with the code, and with one another in GitHub's view. The built site is in test_docs_site.py."""

import ast
import functools
import re
from pathlib import Path

import pytest

from simmim.config.pretrain_recipes import RECIPES, find_recipe

ROOT = Path(__file__).parents[2]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*DOCS, *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"))]


def text_of(page: Path) -> str:
    """The page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


@functools.cache
def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the page's headings: letters, digits, hyphens and underscores are kept."""
    headings = re.findall(r"^#+ (.+)$", text_of(page), flags=re.MULTILINE)
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings(page):
    broken = []
    for path, anchor in re.findall(r"\]\((?!\w+:)([^)#\s]*)#?([^)\s]*)\)", text_of(page)):
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(f"{path}#{anchor}")
    assert broken == []


def test_every_page_is_in_the_sites_navigation():
    listed = re.findall(r"\b([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), flags=re.MULTILINE)
    results = (ROOT / "benchmarks" / "results").glob("*.md")
    assert {page.name for page in (*DOCS, *results)} - set(listed) == set()


def test_the_table_of_recipes_has_their_sizes_epochs_and_batches():
    table = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w-]+)` \| .*?, (\d+)(?:x(\d+))? \| (\d+) × (\d+) \|", table, re.M)
    told = {
        name: ((int(height), int(width or height)), float(epochs), int(batch))
        for name, height, width, epochs, batch in rows
    }
    recipes = {name: find_recipe(name) for name in RECIPES}
    assert told == {name: (each.image_size, each.epochs, each.batch_size) for name, each in recipes.items()}


def templates() -> list[str]:
    """Every string of the package, with `…` for each value that is put in."""
    found = []
    for path in (ROOT / "src" / "simmim").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_the_messages_of_troubleshooting_are_those_of_the_code():
    blocks = re.findall(
        r"<!-- messages -->\n```text\n(.*?)```", (ROOT / "docs" / "troubleshooting.md").read_text(), flags=re.DOTALL
    )
    messages = [line for block in blocks for line in block.splitlines()]
    assert len(blocks) == 10
    known = templates()
    assert [message for message in messages if not any(message in template for template in known)] == []
